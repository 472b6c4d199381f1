"""What quantizers of weights lose, measured on SmolLM2-135M: perplexity, divergence from the exact model, and first choices.

All 210 linear layers of the decoder are quantised. The text is the first 6,000 tokens of the addresses of 2024 and 2026, or of
British news, in six windows behind the end token. Statistics come from gradients within each layer over 2,048 random ids; for
`self` over 8,192 tokens that the model writes itself. The published weights lie on a grid of 4 bits along the inputs; the
second half of the table has them moved off it by noise, which is the honest case for what works along the inputs. `recovered`
is the share of minmax's loss in perplexity that a scheme avoids. With `--lambada N` each model also says the last words of
LAMBADA's first N passages. Cost on one core of a server CPU: about eight minutes for each number of bits, six more at the
first time for the text of `self`, 4 GiB of memory, and a download of 100 MB at the first time.

Command: ``python -m flexgen_helm.runs.quantizers --bits 4 --json result.json``
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from flexgen_helm.assets.helm_data import lambada_passages
from flexgen_helm.runs.command_line import add_json, make_parser, prepare_libraries, reports_errors, write_json
from flexgen_helm.runs.quantizers.last_words import LastWords, Quiz, describe, split_passages
from flexgen_helm.runs.quantizers.protocol import TEXTS, Subject
from flexgen_helm.runs.quantizers.schemes import SCHEMES, Statistics

BASELINE = "minmax"
LAMBADA_PASSAGES = 5153


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    scheme: str
    off_grid: bool
    bits: float
    perplexity: float
    recovered: float
    """Share of minmax's loss in perplexity that is avoided."""
    divergence: float
    """Mean Kullback-Leibler divergence from the exact model, in nats a token."""
    agreement: float
    """Share of the tokens with the exact model's first choice."""
    seconds: float
    """Processor time of quantising and dequantising."""
    last_words: LastWords | None
    """Against the exact model and against the line before; None without ``--lambada``."""


def measure(schemes: list[str], all_bits: list[int], subject: Subject, quiz: Quiz | None) -> Iterator[Result]:
    """Measure schemes, minmax first for each number of bits."""
    off_grid = subject.off_grid
    statistics = Statistics(
        subject.sensitivities(subject.random_ids()) if {"columns", "entropy"} & set(schemes) else {},
        subject.sensitivities(subject.own_text()) if "self" in schemes else {},
    )
    exact = subject.predict()
    yield Result("exact", off_grid, 16.0, exact.perplexity, 1.0, 0.0, 1.0, 0.0, quiz and quiz.ask(subject.model))
    for bits in all_bits:
        worst = None
        for name in (BASELINE, *(name for name in schemes if name != BASELINE)):
            begun = time.process_time()
            quantised = SCHEMES[name](subject.weights, statistics, bits)
            seconds = time.process_time() - begun
            subject.use(quantised.weights)
            found = subject.compare(exact)
            worst = worst or found.perplexity
            recovered = (worst - found.perplexity) / (worst - exact.perplexity)
            values = (found.perplexity, recovered, found.divergence, found.agreement)
            last_words = quiz and quiz.ask(subject.model)
            yield Result(f"w{bits}-{name}", off_grid, quantised.bits, *values, seconds, last_words)


def passages_count(text: str) -> int:
    """Return a number of LAMBADA's passages that has a standard error."""
    if not text.isdecimal() or not 2 <= int(text) <= LAMBADA_PASSAGES:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 2 to {LAMBADA_PASSAGES:,}, all passages of LAMBADA")
    return int(text)


@reports_errors
def main() -> int:
    """Measure and print a table."""
    parser = make_parser("quantizers", __doc__)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="what to compare with minmax")
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4, 8), default=[4], help="bits of the schemes' names")
    parser.add_argument("--grid", choices=("on", "off", "both"), default="both", help="weights as published, or moved")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--text", choices=TEXTS, default="addresses", help="what is read (default: %(default)s)")
    parser.add_argument("--lambada", type=passages_count, default=0, metavar="N", help="also ask for N last words")
    add_json(parser)
    arguments = parser.parse_args()
    prepare_libraries(arguments.threads)
    results: list[Result] = []
    print("scheme       grid   bits   perplexity  recovered  divergence  agreement  seconds")
    with torch.no_grad():
        for off_grid in {"on": [False], "off": [True], "both": [False, True]}[arguments.grid]:
            subject = Subject(off_grid, arguments.text)
            texts = lambada_passages()[: arguments.lambada] if arguments.lambada else []
            quiz = Quiz(split_passages(texts, subject.tokenizer, subject.end)) if texts else None
            for x in measure(arguments.schemes, arguments.bits, subject, quiz):
                results.append(x)
                print(
                    f"{x.scheme:11}  {'off' if off_grid else 'on':4} {x.bits:6.3f}  {x.perplexity:10.2f}  {x.recovered:9.1%}  "
                    f"{x.divergence:10.4f}  {x.agreement:9.1%}  {x.seconds:7.1f}",
                    flush=True,
                )
                if x.last_words is not None:
                    print(describe(x.last_words), flush=True)
    write_json(arguments.json, [asdict(x) for x in results])
    return 0


if __name__ == "__main__":
    sys.exit(main())
