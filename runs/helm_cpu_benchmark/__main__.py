"""HELM's own Hugging Face client against the engine: SmolLM2-135M in float32 on this CPU, both through ``helm-run``.

Both sides get the same weights, threads and run entries, each entry as a command of its own; they take turns. HELM's client
runs with one thread of HELM, its best on a CPU, and with the attention that transformers chooses. No request cache.

Model time is the sum of HELM's request times: tokenisation and computation on both sides, answers written to the journal on the
engine's; loading of the model is left out (it is in the wall clock, with everything else). The token ratio is prompt tokens
asked over those that are left when every distinct prefix is computed once. Answers that differ, and some that do not, are
judged by plain transformers, one request at a time.
Cost on two cores of a server CPU: about 20 minutes, 4 GiB of memory. Machines that do other work slow the two sides unequally.

Command: ``python -m flexgen_helm.runs.helm_cpu_benchmark --threads 2 --json result.json``
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.command_line import add_json, add_model, make_parser, prepare_libraries, reports_errors, write_json
from flexgen_helm.runs.cpu_benchmark.contenders import copy_without_end_tokens
from flexgen_helm.runs.helm_cpu_benchmark.answers import count_tokens, loading_seconds, read_answers
from flexgen_helm.runs.helm_cpu_benchmark.contenders import OURS, THEIRS, run
from flexgen_helm.runs.helm_cpu_benchmark.differences import compare
from flexgen_helm.runs.helm_cpu_benchmark.entries import ENTRIES, Entry
from flexgen_helm.runs.helm_cpu_benchmark.judge import Judge
from flexgen_helm.runs.helm_cpu_benchmark.report import Comparison, Side, render, total_lines


def measure(entry: Entry, model_folder: Path, scratch: Path, *, instances: int, threads: int) -> Comparison:
    """Run both sides and compare what they took and answered.

    Raises:
        FlexGenError: A command failed, or the sides were asked different things.
    """
    theirs = run(THEIRS, entry.run_entry, model_folder, scratch / "theirs", instances=instances, threads=threads)
    ours = run(OURS, entry.run_entry, model_folder, scratch / "ours", instances=instances, threads=threads)
    answers = read_answers(theirs.suite), read_answers(ours.suite)
    if [asked for asked, _ in answers[0]] != [asked for asked, _ in answers[1]]:
        raise FlexGenError(
            f"{entry.run_entry}: HELM adapted it differently for the two deployments, so their times do not compare. Use a "
            "model folder with a tokenizer that both clients read alike."
        )
    pairs = [(asked, their, our) for (asked, their), (_, our) in zip(*answers, strict=True)]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokens = count_tokens(tokenizer.encode(asked.prompt, add_special_tokens=False) for asked, _, _ in pairs)
    return Comparison(
        entry=entry,
        threads=threads,
        requests=len(pairs),
        tokens_asked=tokens[0],
        tokens_computed=tokens[1],
        theirs=Side(sum(their.seconds for _, their, _ in pairs) - loading_seconds(theirs.log), theirs.wall_s, theirs.steps_s),
        ours=Side(sum(our.seconds for _, _, our in pairs), ours.wall_s, ours.steps_s),
        differences=compare(pairs, Judge(model_folder)),
    )


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    parser = make_parser("helm_cpu_benchmark", __doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of both sides")
    parser.add_argument("--entries", nargs="+", choices=sorted(ENTRIES), default=list(ENTRIES), help="only these")
    parser.add_argument("-m", "--max-eval-instances", type=int, metavar="N", help="of each entry, in place of its own number")
    add_model(parser)
    add_json(parser)
    options = parser.parse_args()
    prepare_libraries(options.threads)
    results: dict[str, Comparison] = {}
    model_folder = options.model or smollm2_folder()
    with tempfile.TemporaryDirectory() as name:
        endless = copy_without_end_tokens(model_folder, Path(name) / f"{model_folder.name}-endless")
        for key in options.entries:
            entry, scratch = ENTRIES[key], Path(name) / key
            folder, instances = endless if entry.endless else model_folder, options.max_eval_instances or entry.instances
            results[key] = measure(entry, folder, scratch, instances=instances, threads=options.threads)
            print("\n".join(render(results[key])), flush=True)
            write_json(options.json, {key: one.as_dict() for key, one in results.items()})
    print("\n".join(total_lines(list(results.values()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
