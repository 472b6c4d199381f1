"""A whole comparison: from what a user names to the frames of which reports and gates are made."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from helm.benchmark.presentation.schema import get_default_schema_path

from flexgen_helm.errors import FlexGenError
from flexgen_helm.reports.answers import Answers, Metrics, read_answers
from flexgen_helm.reports.fidelity_results import FidelityResult, find_fidelity, read_fidelity
from flexgen_helm.reports.figures import baseline_figures, candidate_figures
from flexgen_helm.reports.join import Joined, join
from flexgen_helm.reports.main_metrics import MainMetrics
from flexgen_helm.reports.naming import check_same_model, records, short_names
from flexgen_helm.reports.schema import read_directions
from flexgen_helm.reports.selection import Selection, select, select_one

OUTPUT_PATH = Path("benchmark_output")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How runs are found and compared."""

    output_path: Path = OUTPUT_PATH
    """HELM's output path, for suites that are given by name."""
    schema: Path | None = None
    """Schema of HELM that names the main metrics; None: ``schema.json`` of the baseline's suite, if there is one."""
    fidelity: Sequence[Path] | None = None
    """Results of ``flexgen-helm fidelity``; None: those in the cache folder."""
    common_runs: bool = False
    """Whether run entries that one side lacks are left out."""
    other_models: bool = False
    """Whether candidates may be another model than the baseline."""

    @classmethod
    def from_options(cls, options: Namespace) -> Choices:
        """Return what the options say that ``report`` and ``check`` have in common."""
        return cls(
            output_path=options.output_path.expanduser(),
            schema=options.schema_path,
            fidelity=options.fidelity,
            common_runs=options.common_runs,
            other_models=options.other_models,
        )


@dataclass(frozen=True)
class Comparison:
    """A baseline and candidates."""

    baseline: Answers
    candidates: tuple[Answers, ...]
    joined: Mapping[str, Joined]
    """By name of the candidate."""
    figures: pd.DataFrame
    """See `flexgen_helm.reports.figures.FIGURE_COLUMNS`; the baseline's come first."""
    fidelity: Mapping[str, FidelityResult | None]
    """By name of the candidate."""

    @property
    def pairs(self) -> pd.DataFrame:
        """The joined rows of all candidates, with their name as ``configuration``."""
        frames = [each.rows.assign(configuration=name) for name, each in self.joined.items()]
        return pd.concat(frames, ignore_index=True)


def compare(
    baseline: str, candidates: Sequence[str], choices: Choices | None = None, *, say: Callable[[str], None] = lambda _: None
) -> Comparison:
    """Compare runs of HELM.

    Args:
        baseline: ``SUITE`` or ``SUITE:MODEL``, see `flexgen_helm.reports.selection.select`.
        candidates: The same, at least one; ``SUITE`` stands for all its models but the baseline.
        choices: How runs are found and compared.
        say: Told what happens, a line at a time.

    Raises:
        CorruptFile: A file cannot be read, a run did not end, or two runs have one name.
        FlexGenError: There is no such suite or model, or runs cannot be compared; the message says why.
    """
    choices = choices or Choices()
    selections = _select(baseline, candidates, choices)
    engines = [next(iter(records(each)), None) for each in selections]
    if not choices.other_models:
        for selection, engine in zip(selections[1:], engines[1:], strict=True):
            check_same_model(selections[0], selection, (engines[0], engine))
    metrics = read_metrics(choices.schema or selections[0].suite / "schema.json", required=choices.schema is not None)
    results = read_fidelity(choices.fidelity)
    names = short_names(selections, engines)
    say(f"reading {names[0]} (the baseline): {len(selections[0].runs):,} runs")
    before = read_answers(selections[0], metrics, name=names[0])
    figures, joined, found, after = [baseline_figures(before)], {}, {}, []
    for name, selection in zip(names[1:], selections[1:], strict=True):
        say(f"reading {name}: {len(selection.runs):,} runs")
        answers = read_answers(selection, metrics, name=name)
        joined[name] = join(before, answers, common_runs=choices.common_runs)
        found[name] = find_fidelity(results, before.engine, answers.engine)
        figures.append(candidate_figures(answers, joined[name], before, found[name]))
        after.append(answers)
    return Comparison(before, tuple(after), joined, pd.concat(figures, ignore_index=True), found)


def _select(baseline: str, candidates: Sequence[str], choices: Choices) -> list[Selection]:
    first = select_one(baseline, choices.output_path)
    chosen = [first]
    for text in candidates:
        found = select(text, choices.output_path)
        others = [
            each for each in found if (each.suite.resolve(), each.deployment) != (first.suite.resolve(), first.deployment)
        ]
        chosen.extend(others or (found if len(found) == 1 else []))
    places = [(each.suite.resolve(), each.deployment) for each in chosen[1:]]
    for place in places:
        if places.count(place) > 1:
            raise FlexGenError(f"The candidate `{place[1]}` of {place[0]} is given twice. Give it once.")
    if not places:
        raise FlexGenError("There is no candidate. Give --candidates SUITE:MODEL, or a suite with other models in it.")
    return chosen


def read_metrics(schema: Path, *, required: bool) -> Metrics:
    """Read which metrics count from HELM's schema, and from a suite's own.

    Args:
        schema: Of the suite.
        required: Whether the file must exist; else HELM's schema alone is read where it does not.

    Raises:
        FlexGenError: The file cannot be read.
    """
    given = schema if required or schema.is_file() else None
    lower = read_directions(Path(get_default_schema_path())) | (read_directions(given) if given else {})
    return Metrics(MainMetrics.read(given), lower)
