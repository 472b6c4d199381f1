"""The whole mission in one command: a model under a memory limit and a compressed variant of it, on three of HELM's scenarios.

Weights come from disk where they exceed the limit, and a policy is searched for the requests of all scenarios together. The
plan is printed before, predicted against measured time after; then a report and the gate's verdict. Run the same command
again after an interruption: what is finished is not computed again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.cli import main as flexgen_helm
from flexgen_helm.evaluation.choices import DTYPES, plain_choices
from flexgen_helm.evaluation.commands import Evaluation
from flexgen_helm.gate.verdict import PASSED, REGRESSION, UNDECIDED
from flexgen_helm.runs.accuracy_vs_compression.steps import Step, Study, never, run_steps, runs_of, steps_of
from flexgen_helm.runs.command_line import make_parser, reports_errors

SUITE, VARIANT, INSTANCES = "end_to_end", "w4kv4s10", 40
WORDS = {PASSED: "it passes", REGRESSION: "a regression", UNDECIDED: "it cannot be decided on so few questions"}
LIMIT = "device=450MiB,host=0GiB"
"""Memory for SmolLM2-135M in float32, whose weights alone take 513 MiB."""
POLICY = "auto=true,gpu_batch_tokens=128"
"""Rows of a quarter of the usual tokens: attention over compressed K and V takes 0.6 GiB for the usual ones."""


@reports_errors
def main() -> int:
    """Run the command and return its exit status: 0 if everything ran, whatever the gate says."""
    parser = make_parser("end_to_end", __doc__)
    add = parser.add_argument
    add("--model", metavar="M", help="model folder or hub name without a variant (default: SmolLM2-135M-Instruct)")
    add("--variant", default=VARIANT, metavar="V", help="compressed variant, as behind the @ (%(default)s)")
    add("--max-memory", default=LIMIT, metavar="LIMITS", help="memory of each tier (%(default)s)")
    add("--policy", default=POLICY, metavar="P", help="auto, or with fields that are kept (%(default)s)")
    add("--device", default="auto", metavar="D", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    add("--dtype", default="auto", choices=DTYPES, help="auto: the checkpoint's 16 bits on a GPU, float32 on a CPU")
    add("--profile", metavar="NAME|FILE", help="machine for which the policy is searched (default: this one, measured)")
    add("--offload-folder", type=Path, metavar="DIR", help="folder for weights on disk (default: in the cache folder)")
    add("--suite", default=SUITE, metavar="S", help="other scenarios: as for flexgen-helm eval (%(default)s)")
    drawn = "instances of each run entry, drawn at random and equal for both (%(default)s)"
    add("-m", "--max-eval-instances", type=int, default=INSTANCES, metavar="N", help=drawn)
    add("--out", type=Path, default=Path("end_to_end"), metavar="DIR", help="output folder (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = ("max_memory", "policy", "device", "dtype", "profile", "offload_folder")
    study = Study(
        model=args.model or str(smollm2_folder()),
        variants=[args.variant],
        instances=args.max_eval_instances,
        fidelity_tokens=0,
        out=args.out,
        suite=args.suite,
        options=plain_choices({name: getattr(args, name) for name in names}),
    )
    status: int = run_steps(list(steps(study)))
    return status


def steps(study: Study) -> Iterator[Step]:
    """Yield the steps of a comparison, behind each evaluation a look at its prediction, and the gate at the end.

    Raises:
        FlexGenError: There is no such model, variant or suite.
    """
    made = list(steps_of(study))
    evaluations = [study.evaluation(None), *map(study.evaluation, study.variants)]
    for step, evaluation in zip(made, evaluations, strict=False):
        yield step
        yield Step(step.title.replace("evaluate", "predicted and measured:"), never, lambda of=evaluation: _replay(of))
    yield from made[len(evaluations) :]
    yield Step("gate", never, lambda: _gate(study, *evaluations))


def _replay(evaluation: Evaluation) -> int:
    """Show what was predicted for an evaluation beside what was measured; where nothing was predicted, say so."""
    run = next(run for run in runs_of(evaluation) if run.record() is not None)
    flexgen_helm(["plan", "--replay", str(run.record_path)])
    return 0


def _gate(study: Study, before: Evaluation, *candidates: Evaluation) -> int:
    """Print the verdicts. A regression is what the gate found, and no failure of this command."""
    folder, file = before.suite_folder, study.out / "gate.json"
    file.unlink(missing_ok=True)
    named = [f"{folder}:{evaluation.deployment}" for evaluation in candidates]
    status = flexgen_helm(["check", "--baseline", f"{folder}:{before.deployment}", "--candidates", *named, "--json", str(file)])
    if not file.exists():
        return status
    print(f"The gate says: {WORDS[status]} (exit status {status} of flexgen-helm check); verdicts in {file}", flush=True)
    return PASSED


if __name__ == "__main__":
    sys.exit(main())
