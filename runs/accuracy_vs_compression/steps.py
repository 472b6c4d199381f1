"""The steps from nothing to a report, each of them left out where its result is there already."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helm.benchmark.presentation.run_entry import read_run_entries
from helm.benchmark.run import run_entries_to_run_specs

from flexgen_helm.assets.helm_data import speech_file
from flexgen_helm.cli import main as flexgen_helm
from flexgen_helm.errors import FlexGenError
from flexgen_helm.evaluation.commands import Evaluation, environment, server_command, summarize_command
from flexgen_helm.evaluation.evaluate import evaluate, make_evaluation
from flexgen_helm.evaluation.processes import cause_of_failure, execute
from flexgen_helm.helm.disk_errors import RESUME
from flexgen_helm.helm.runner import INTERRUPTED
from flexgen_helm.reports.engine_record import EngineRecord, engine_record
from flexgen_helm.reports.fidelity_results import find_fidelity, read_fidelity
from flexgen_helm.reports.runs import Run, list_runs

SUITE = "accuracy_vs_compression"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared, on how much."""

    model: str
    """Folder or hub name of the 16-bit model."""
    variants: Sequence[str]
    """Names as behind the ``@``."""
    instances: int
    """Most instances of each run entry."""
    fidelity_tokens: int
    """Tokens of the State of the Union Address of 2026 over which predictions are compared; 0: they are not."""
    out: Path
    """HELM's output folder; the report goes into ``report`` in it."""
    suite: str = SUITE
    """A suite as ``flexgen-helm eval`` takes it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of ``Engine.from_pretrained`` for all evaluations, as YAML can hold them."""
    partial: bool = False
    """Whether run entries may fail, as those do whose data cannot be downloaded. The report leaves them out by name."""
    notes: Callable[[Evaluation], Sequence[str]] = lambda _: ()
    """Returns lines that readers of the report must know, given the evaluation of the 16-bit model."""

    def evaluation(self, variant: str | None) -> Evaluation:
        """Return the evaluation of a variant, None: of the 16-bit model.

        Raises:
            FlexGenError: There is no such model, variant or suite.
        """
        model = self.model if variant is None else f"{self.model}@{variant}"
        return make_evaluation(model, self.suite, self.out, self.instances, self.options)


@dataclass(frozen=True)
class Step:
    """Something to do."""

    title: str
    is_done: Callable[[], bool]
    do: Callable[[], int]
    """Returns the exit status."""


def run(study: Study) -> int:
    """Do every step whose result is missing; stop at the first that fails.

    Returns:
        The exit status of the step that failed, 0 if none did.

    Raises:
        FlexGenError: There is no such model, variant or suite, or a step cannot be done.
    """
    return run_steps(list(steps_of(study)))


def run_steps(steps: Sequence[Step]) -> int:
    """Do the steps that are not done; stop at the first that fails and return its exit status, 0 if none did."""
    for number, step in enumerate(steps, 1):
        start = time.monotonic()
        if step.is_done():
            print(f"[{number}/{len(steps)}] {step.title}: done before", flush=True)
            continue
        print(f"[{number}/{len(steps)}] {step.title}", flush=True)
        status = step.do()
        if status:
            print(f"[{number}/{len(steps)}] {step.title} failed. The same command goes on from here.", flush=True)
            return status
        print(f"[{number}/{len(steps)}] {step.title}: {time.monotonic() - start:.0f} s", flush=True)
    return 0


def steps_of(study: Study) -> Iterator[Step]:
    """Yield evaluations, comparisons of predictions, HELM's tables, and the report.

    Raises:
        FlexGenError: There is no such model, variant or suite.
    """
    before = study.evaluation(None)
    candidates = {variant: study.evaluation(variant) for variant in study.variants}
    for name, evaluation in (("16 bits", before), *candidates.items()):
        yield _evaluating(study, name, evaluation)
    for variant, evaluation in candidates.items() if study.fidelity_tokens else ():
        yield _measuring(study, variant, before, evaluation)
    if study.fidelity_tokens:
        yield Step("HELM's tables", never, lambda: _summarize(before))
    yield Step("report", never, lambda: _report(study, before, candidates.values()))


def never() -> bool:
    """Say that a step is done again each time, because that takes seconds."""
    return False


def _evaluating(study: Study, name: str, evaluation: Evaluation) -> Step:
    def do() -> int:
        status = _evaluate(evaluation)
        is_enough = study.partial and any(run.is_complete for run in runs_of(evaluation))
        return 0 if is_enough and status != INTERRUPTED else status

    return Step(f"evaluate {name}", lambda: is_evaluated(evaluation), do)


def _evaluate(evaluation: Evaluation) -> int:
    try:
        return evaluate(evaluation)
    except KeyboardInterrupt:
        print(f"Interrupted. {RESUME}", flush=True)
        return INTERRUPTED


def is_evaluated(evaluation: Evaluation) -> bool:
    """Return whether every run of an evaluation is complete, with as many instances as are asked for.

    HELM would run it again from cached answers, and the record of the first time, with its speed, would be lost.
    """
    complete = [
        run
        for run in runs_of(evaluation)
        if run.is_complete and run.spec["adapter_spec"].get("max_eval_instances") == evaluation.max_eval_instances
    ]
    return len(complete) >= evaluation.suite.num_entries


def missing_entries(evaluation: Evaluation) -> list[str]:
    """Return the run entries of which there is no complete run, as HELM names them, without the model."""
    entries = read_run_entries([str(evaluation.suite.run_entries)]).entries
    names = [spec.name for spec in run_entries_to_run_specs(entries, models_to_run=[evaluation.deployment])]
    complete = {run.scenario for run in runs_of(evaluation) if run.is_complete}
    return [entry for name in names if (entry := Run(Path(name)).scenario) not in complete]


def runs_of(evaluation: Evaluation) -> list[Run]:
    """Return the runs of an evaluation that there are."""
    return [run for run in list_runs(evaluation.suite_folder) if run.deployment == evaluation.deployment]


def _measuring(study: Study, variant: str, before: Evaluation, candidate: Evaluation) -> Step:
    def is_done() -> bool:
        found = find_fidelity(read_fidelity(None), _engine(before), _engine(candidate))
        # The first token of a text is predicted only behind tokens that the tokenizer adds.
        return found is not None and found.positions >= study.fidelity_tokens - 1

    def do() -> int:
        command = ["fidelity", "--model", study.model, "--compression", variant, "--text", str(speech_file())]
        return flexgen_helm([*command, "--max-tokens", str(study.fidelity_tokens), "--noise-tokens", "0"])

    return Step(f"fidelity of {variant}", is_done, do)


def _engine(evaluation: Evaluation) -> EngineRecord | None:
    record = next((record for run in runs_of(evaluation) if (record := run.record()) is not None), None)
    return None if record is None else engine_record(record)


def _summarize(evaluation: Evaluation) -> int:
    """Write HELM's tables again, now that there are results of fidelity to show."""
    log = evaluation.new_log()
    status = execute(summarize_command(evaluation), environment(evaluation), log, verbose=False)
    if status:
        raise FlexGenError(f"helm-summarize ended with status {status}. HELM's log is {log}. {cause_of_failure(status, log)}")
    print(f"In a browser: {' '.join(server_command(evaluation))}", flush=True)
    return 0


def _report(study: Study, before: Evaluation, candidates: Iterable[Evaluation]) -> int:
    folder = before.suite_folder
    named = [f"{folder}:{evaluation.deployment}" for evaluation in candidates]
    command = ["report", "--baseline", f"{folder}:{before.deployment}", "--candidates", *named]
    if study.partial:
        command.append("--common-runs")
        missing = missing_entries(before)
        command += ["--note", f"Left out, because their data are not here: {', '.join(missing)}."] if missing else []
    command += [part for note in study.notes(before) for part in ("--note", note)]
    return flexgen_helm([*command, "--out", str(study.out / "report")])
