"""All figures of a comparison, each with its value or the reason why there is none. Nothing here is meant for the eye.

Within one run an instance is a cluster, because its train trials depend on each other. Over several runs, a run entry with one
train trial is a cluster (subject x trial), unless there are fewer than `LEAST_CLUSTERS`: the bootstrap's intervals would be too
narrow, so instances are the clusters.
Several runs are summarised together if their scores are shares of right answers: from 0 to 1, higher is better. Others, such as
bits per byte, are left out of groups and of the suite, and the note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from flexgen_helm.reports.answers import Answers, RunFacts
from flexgen_helm.reports.engine_figures import Cell, engine_cells, fidelity_cells
from flexgen_helm.reports.fidelity_results import FidelityResult
from flexgen_helm.reports.join import SIDES, Joined
from flexgen_helm.statistics.bootstrap import Estimate
from flexgen_helm.statistics.clustered import mean_with_error
from flexgen_helm.statistics.flips import sign_test
from flexgen_helm.statistics.paired import paired_difference, recovery
from flexgen_helm.statistics.power import detectable_by, minimum_detectable_effect

Level = Literal["run", "group", "suite"]
FIGURE_COLUMNS = ("configuration", "level", "scenario", "perturbation", "figure", "value", "low", "high", "note")
"""``level``: ``run`` (one run entry), ``group`` (several of one group of HELM) or ``suite``. ``low`` and ``high`` bound a 95 %
interval. ``note``: where ``value`` is NaN the reason, else what must be known of it, if anything."""
LEAST_CLUSTERS = 20
ONE_CLUSTER = "one cluster does not show how clusters differ"
NO_FLIPS = "no pair differs, which does not show how many others would"
OF_SCORES = (
    *("score_before", "recovery", "difference", "lost", "gained", "flips", "p_value", "p_worse"),
    "minimum_detectable",
)
"""Figures of pairs of scores."""


@dataclass(frozen=True)
class Part:
    """Rows that are summarised together."""

    level: Level
    scenario: str
    """The run entry, the group's name, or ``all runs``."""
    perturbation: str
    rows: pd.DataFrame
    facts: Sequence[RunFacts]
    """Of the runs that the rows belong to, the configuration's."""
    left_out: Sequence[str] = ()
    """Runs whose scores are no shares of right answers."""

    @property
    def clusters(self) -> pd.Series:
        """Cluster of each row; see the module."""
        if self.level != "run" and self.rows["cluster"].nunique() >= LEAST_CLUSTERS:
            return self.rows["cluster"]
        if (self.rows["part"] > 0).any():  # windows of a document, which is often the only one
            return pd.Series(np.arange(len(self.rows)), index=self.rows.index)
        return self.rows["scenario"] + " " + self.rows["instance"]

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower score is better."""
        return self.facts[0].lower_is_better

    def reason(self, column: str) -> str:
        """Return why a column has no value."""
        reasons = {facts.reasons[column] for facts in self.facts if column in facts.reasons}
        return "; ".join(sorted(reasons)) or "no instance has it"

    def note(self, known: pd.Series) -> str:
        """Return what a figure of the rows with a value leaves out."""
        notes = [] if known.all() else [f"{int((~known).sum())} of {len(known)} instances have no score"]
        notes += [f"without {', '.join(self.left_out)}"] if self.left_out else []
        return "; ".join(notes)


def baseline_figures(answers: Answers) -> pd.DataFrame:
    """Return the figures of a configuration alone: score, generated length, unparsable answers, engine. `FIGURE_COLUMNS`."""
    return _frame(answers, answers.rows, lambda part: _single(part, ""), [])


def candidate_figures(candidate: Answers, joined: Joined, baseline: Answers, fidelity: FidelityResult | None) -> pd.DataFrame:
    """Return the figures of a candidate beside the baseline, on the rows that both have. `FIGURE_COLUMNS`."""

    def cells(part: Part) -> Iterator[Cell]:
        missing = joined.missing.loc[[(facts.scenario, part.perturbation) for facts in part.facts]].sum()
        yield Cell("missing_baseline", float(missing["baseline"]))
        yield Cell("missing_candidate", float(missing["candidate"]))
        yield from _single(part, "_after")
        yield from _paired(part)

    return _frame(candidate, joined.rows, cells, fidelity_cells(fidelity, baseline.engine, candidate.engine))


def _frame(answers: Answers, rows: pd.DataFrame, cells: Callable[[Part], Iterator[Cell]], more: Sequence[Cell]) -> pd.DataFrame:
    lines = []
    for part in _parts(answers, rows):
        for cell in (*cells(part), *engine_cells([facts.engine for facts in part.facts]), *more):
            lines.append((answers.name, part.level, part.scenario, part.perturbation, *cell))
    return pd.DataFrame(lines, columns=list(FIGURE_COLUMNS))


def _parts(answers: Answers, rows: pd.DataFrame) -> Iterator[Part]:
    """Yield every run with every perturbation, then groups of several runs, then the suite."""
    rows = rows[rows["counts"]]
    for (scenario, perturbation), each in rows.groupby(["scenario", "perturbation"], sort=True):
        yield Part("run", str(scenario), str(perturbation), each, [answers.runs[str(scenario)]])
    plain = rows[rows["perturbation"] == ""]
    present = [answers.runs[str(name)] for name in plain["scenario"].unique()]
    groups: dict[str, list[RunFacts]] = {}
    for facts in present:
        groups.setdefault(facts.group, []).append(facts)
    for group, members in groups.items():
        if len(members) > 1:
            yield from _together("group", group, plain, members)
    yield from _together("suite", "all runs", plain, present)


def _together(level: Level, name: str, rows: pd.DataFrame, members: Sequence[RunFacts]) -> Iterator[Part]:
    """Yield the runs whose scores are shares of right answers; all of them if they have one metric; else nothing."""
    lowest, highest = _bounds(rows)
    shares = [each for each in members if not each.lower_is_better and lowest[each.scenario] >= 0 >= highest[each.scenario] - 1]
    if not shares and len({facts.metric for facts in members}) == 1:
        shares = list(members)
    if shares:
        names = {facts.scenario for facts in shares}
        left_out = [facts.scenario for facts in members if facts.scenario not in names]
        yield Part(level, name, "", rows[rows["scenario"].isin(names)], shares, left_out)


def _bounds(rows: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Return the lowest and the highest score of each run, of both sides; NaN for a run without scores."""
    scores = rows[[name for name in rows.columns if name.split("_")[0] == "score"]]
    return scores.min(axis=1).groupby(rows["scenario"]).min(), scores.max(axis=1).groupby(rows["scenario"]).max()


def _single(part: Part, side: str) -> Iterator[Cell]:
    yield Cell("instances", float(len(part.rows)))
    scores = part.rows["score" + side]
    known = scores.notna()
    if known.any():
        mean = mean_with_error(scores[known], part.clusters[known])
        yield Cell("score", mean.value, note=part.note(known))
        yield Cell.of("standard_error", mean.standard_error, ONE_CLUSTER)
    else:
        whole = part.facts[0].score if part.level == "run" and not part.perturbation else None
        yield Cell.of("score", whole, part.reason("score"), note="HELM's value for the whole run")
        yield Cell("standard_error", note=part.reason("score"))
    yield _mean("tokens", part, "tokens" + side)
    yield _mean("unparsable", part, "parsable" + side)


def _mean(figure: str, part: Part, column: str) -> Cell:
    values = part.rows[column].dropna()
    if values.empty:
        return Cell(figure, note=part.reason(column.split("_")[0]))
    mean = float(values.mean())
    return Cell(figure, 1 - mean if column.startswith("parsable") else mean)


def _paired(part: Part) -> Iterator[Cell]:
    known = part.rows["score_before"].notna() & part.rows["score_after"].notna()
    if known.any():
        yield from _change_of_score(part, known)
    else:
        yield from (Cell(name, note=part.reason("score")) for name in OF_SCORES)
    yield _change_of_logprob(part)
    yield _mean("unparsable_before", part, "parsable_before")
    yield _mean("tokens_before", part, "tokens_before")
    before, after = part.rows["tokens_before"], part.rows["tokens_after"]
    both = before.notna() & after.notna()
    total = float(before[both].sum())
    reason = "the baseline generated nothing" if both.any() else part.reason("tokens")
    yield Cell.of("length_ratio", float(after[both].sum()) / total if total else None, reason)


def _change_of_score(part: Part, known: pd.Series) -> Iterator[Cell]:
    """Yield the figures of pairs of scores. Lost is what got worse, whichever direction is better."""
    rows, clusters, note = part.rows[known], part.clusters[known], part.note(known)
    before, after = (rows[f"score{side}"].to_numpy(float) for side in SIDES)
    ratio = recovery(after, before, clusters) if part.lower_is_better else recovery(before, after, clusters)
    paired = paired_difference(before, after, clusters)
    better = -1 if part.lower_is_better else 1
    counted = sign_test(better * before, better * after)
    few = f"{paired.num_clusters} clusters: the interval is too narrow" if paired.num_clusters < LEAST_CLUSTERS else ""
    intervals = "; ".join(filter(None, [few, note]))
    binary = bool(np.isin([before, after], (0, 1)).all())
    how = "; ".join(filter(None, ["" if binary else "sign test, because scores are not all 0 or 1", note]))
    yield Cell("score_before", float(before.mean()), note=note)
    yield _recovery(ratio, intervals)
    yield Cell.of("difference", paired.difference, "", paired.interval, note=intervals)
    yield Cell("lost", float(counted.lost), note=how)
    yield Cell("gained", float(counted.gained), note=how)
    yield Cell("flips", counted.disagreement_rate, note=how)
    yield Cell("p_value", counted.p_value, note=how)
    yield Cell("p_worse", counted.p_worse, note=how)
    if binary and clusters.is_unique:
        effect = minimum_detectable_effect(counted.disagreement_rate, counted.num)
    else:
        effect = detectable_by(paired.standard_error)
    yield Cell.of("minimum_detectable", effect, ONE_CLUSTER if paired.standard_error is None else NO_FLIPS)


def _recovery(ratio: Estimate | None, note: str) -> Cell:
    if ratio is None:
        return Cell("recovery", note="the baseline's score is 0")
    return Cell.of("recovery", ratio.value, "", ratio.interval, note=note)


def _change_of_logprob(part: Part) -> Cell:
    before, after = part.rows["logprob_before"], part.rows["logprob_after"]
    known = before.notna() & after.notna()
    if not known.any():
        return Cell("logprob_change", note=part.reason("logprob"))
    paired = paired_difference(before[known], after[known], part.clusters[known])
    note = "" if known.all() else f"of {int(known.sum())} of {len(known)} instances"
    return Cell.of("logprob_change", paired.difference, "", paired.interval, note=note)
