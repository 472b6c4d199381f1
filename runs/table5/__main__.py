"""Table 5 of the FlexGen paper for a model at hand: 16 bits, 4 bits, and 4 bits with sparse attention.

Weights, K and V have 4 bits, and with sparsity a query reads 10 % of V: by this project's schemes and by FlexGen's beside them.
Accuracy is that of LAMBADA's last words, each behind five whole passages, because a passage alone is shorter than a chunk, in
which this project compresses nothing. Perplexity is that of the addresses of 2024 and 2026 in windows of 2,000 tokens. All
columns answer the same prompts in float32. Behind +- stand standard errors: over contexts that ten questions share, and over
blocks of 100 tokens; differences from 16 bits are paired. The command fails where two columns are equal to the last bit.

Cost, estimated from a part: 100 s of processor time a column, more with sparsity; at the first time fitting and a download.

Command: ``python -m flexgen_helm.runs.table5 --json result.json``
"""

from __future__ import annotations

import sys
from dataclasses import asdict

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.assets.helm_data import lambada_passages
from flexgen_helm.assets.sotu import recent_addresses
from flexgen_helm.runs.command_line import add_json, add_model, make_parser, prepare_libraries, reports_errors, write_json
from flexgen_helm.runs.table5.columns import Figures, Value, Work, answer, check_distinct, compared, figures
from flexgen_helm.runs.table5.prompts import make_questions

VARIANTS = ("w4kv4", "w4kv4s10", "w4kv4-flexgen", "w4kv4s10-flexgen")
TITLE = "                  LAMBADA           less 16 bits'     perplexity       over 16 bits'     processor s"


@reports_errors
def main() -> int:
    """Measure and print a table."""
    parser = make_parser("table5", __doc__)
    add_model(parser)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="V", help="as behind the @ of a model")
    parser.add_argument("--num-questions", type=int, default=80, metavar="N", help="of LAMBADA (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4000, metavar="N", help="of the addresses (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (%(default)s)")
    add_json(parser)
    options = parser.parse_args()
    prepare_libraries(options.threads)
    model = options.model or smollm2_folder()
    work = Work(make_questions(lambada_passages(), options.num_questions), recent_addresses(), options.tokens)
    print(TITLE)
    columns, found, differences = [], [], []
    for variant in (None, *options.variants):
        columns.append(answer(model, variant, work))
        found.append(figures(columns[-1], columns[0]))
        print(row(found[-1]), flush=True)
        check_distinct(columns)
        if len(columns) > 1:
            differences.append(compared(*columns[-2:]))
    print("\n".join(["", *differences]))
    write_json(options.json, {"columns": [asdict(each) for each in found], "differences": differences})
    return 0


def row(x: Figures) -> str:
    """Return the line of a column."""
    cells = (percent(x.accuracy), percent(x.accuracy_change), number(x.perplexity), number(x.perplexity_ratio))
    return f"{x.name:17} {cells[0]:17} {cells[1]:17} {cells[2]:16} {cells[3]:17} {x.cpu_s:11.0f}"


def percent(x: Value) -> str:
    """Return a share and its standard error."""
    return f"{x.value:.1%}" if x.error is None else f"{x.value:.1%} +- {x.error:.1%}"


def number(x: Value) -> str:
    """Return a number and its standard error."""
    return f"{x.value:.3f}" if x.error is None else f"{x.value:.3f} +- {x.error:.3f}"


if __name__ == "__main__":
    sys.exit(main())
