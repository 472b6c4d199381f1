"""The plots of a comparison, each from the figures alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from flexgen_helm.reports.comparing import Comparison
from flexgen_helm.reports.presentation.style import BASELINE, GAINED, LOST, canvas, look, saved, settings, short, spread
from flexgen_helm.reports.presentation.words import labels

Z95 = 1.959964
MOST_UNITS = 24
"""Run entries in a plot; where there are more, those of a group are shown together."""
MOST_PANELS = 6
WIDTH = 9.0


@dataclass(frozen=True)
class Plot:
    """A plot, or the reason why there is none."""

    name: str
    """Of its files."""
    title: str
    caption: str
    """What it shows; the reason where it is not there."""
    images: dict[str, bytes]
    """By kind, ``png`` and ``svg``; empty: there is no plot."""


def draw_all(comparison: Comparison) -> list[Plot]:
    """Draw all plots."""
    data = _Data(comparison)
    drawings: tuple[tuple[str, str, Callable[[_Data], tuple[Figure | None, str]]], ...] = (
        ("accuracy_against_bits", "Accuracy against bits per weight", _accuracy_against_bits),
        ("paired_differences", "Paired differences", _paired_differences),
        ("accuracy_against_throughput", "Accuracy against throughput", _accuracy_against_throughput),
        ("flips", "Answers that flipped", _flips),
        ("kl_tail", "Tail of the KL divergence", _kl_tail),
    )
    plots = []
    for name, title, draw in drawings:
        with settings():
            figure, caption = draw(data)
            plots.append(Plot(name, title, caption, {} if figure is None else saved(figure)))
    return plots


class _Data:
    """Figures as plots need them."""

    def __init__(self, comparison: Comparison) -> None:
        self.baseline = comparison.baseline.name
        self.candidates = [each.name for each in comparison.candidates]
        self.labels = labels(comparison.baseline.runs)
        self.metrics = {scenario: facts.metric for scenario, facts in comparison.baseline.runs.items()}
        lower = {scenario for scenario, facts in comparison.baseline.runs.items() if facts.lower_is_better}
        figures = comparison.figures[comparison.figures["perturbation"] == ""]
        columns = ["configuration", "level", "scenario", "figure", "value", "low", "high"]
        self._figures = {tuple(line[:4]): line[4:] for line in figures[columns].itertuples(index=False, name=None)}
        units = figures[["level", "scenario"]].drop_duplicates()
        runs = list(units[units.level == "run"].scenario)
        groups = list(units[units.level == "group"].scenario)
        members = {run: facts.group for run, facts in comparison.baseline.runs.items()}
        self.merged = len(runs) > MOST_UNITS
        singles = [run for run in runs if not (self.merged and members[run] in groups)]
        self.shares = [("run", run) for run in singles if run not in lower]
        self.others = [("run", run) for run in singles if run in lower]
        if self.merged:
            self.shares = [("group", group) for group in groups] + self.shares
        if (units.level == "suite").any():
            self.shares.append(("suite", "all runs"))

    def label(self, unit: tuple[str, str]) -> str:
        """Return what stands beside a run, a group or the suite."""
        return short(self.labels.get(unit[1], unit[1]))

    def figure(self, name: str, unit: tuple[str, str], figure: str) -> tuple[float, float, float] | None:
        """Return value and interval; None where there is none."""
        value, low, high = self._figures.get((name, *unit, figure), (math.nan, math.nan, math.nan))
        return None if pd.isna(value) else (float(value), float(low), float(high))

    def score(self, name: str, unit: tuple[str, str]) -> tuple[float, float] | None:
        """Return score and half of its 95 % interval."""
        score, error = self.figure(name, unit, "score"), self.figure(name, unit, "standard_error")
        return None if score is None else (score[0], Z95 * error[0] if error else 0.0)


SUITE = ("suite", "all runs")


def _accuracy_against_bits(data: _Data) -> tuple[Figure | None, str]:
    names = [data.baseline, *data.candidates]
    all_units = [*data.shares[-1:], *data.shares[:-1], *data.others]
    bits = {name: next((found for unit in all_units if (found := data.figure(name, unit, "bits"))), None) for name in names}
    scored = [unit for unit in all_units if data.score(data.baseline, unit)]
    units = scored[:MOST_PANELS]
    placed = [name for name in data.candidates if bits[name]]
    if not units or not placed:
        return None, "No configuration has both a score and bits per weight."
    columns = min(3, len(units))
    rows = -(-len(units) // columns)
    figure = canvas(max(WIDTH * columns / 3, 5.0), 3.0 * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, unit in zip(panels, units, strict=False):
        _bits_panel(axes, data, unit, {name: value[0] for name, value in bits.items() if value})
    for axes in panels[len(units) :]:
        axes.set_visible(False)
    _legend(figure, panels[0])
    absent = [name for name in data.candidates if not bits[name]]
    text = "Bars are 95 % intervals (1.96 clustered standard errors); the band is the baseline's."
    shown = "" if len(units) == len(scored) else f" {len(units)} of {len(scored)} are drawn; the table has all."
    return figure, text + shown + _without(absent, "no bits per weight is recorded")


def _bits_panel(axes: Any, data: _Data, unit: tuple[str, str], bits: dict[str, float]) -> None:
    base = data.score(data.baseline, unit)
    if base is not None:
        axes.axhspan(base[0] - base[1], base[0] + base[1], color=BASELINE, alpha=0.15, linewidth=0)
        axes.axhline(base[0], color=BASELINE, linewidth=1, linestyle="--")
        if data.baseline in bits:
            axes.plot(
                bits[data.baseline], base[0], color=BASELINE, marker="o", markersize=7, linestyle="", label=short(data.baseline)
            )
    for number, name in enumerate(data.candidates):
        score = data.score(name, unit)
        if score is not None and name in bits:
            beside = bits[name] * 1.035 ** (number - (len(data.candidates) - 1) / 2)  # so that equal bits do not overlap
            axes.errorbar(beside, score[0], yerr=score[1], capsize=3, linestyle="", label=short(name), **look(number))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    values = sorted({round(value, 2) for value in bits.values()})
    axes.set_xticks(_apart(values), [f"{value:g}" for value in _apart(values)])
    axes.set_xlim(min(values) * 0.85, max(values) * 1.18)
    axes.set_title(data.label(unit), fontsize="small")
    axes.set(xlabel="bits per weight", ylabel=data.metrics.get(unit[1], "share of right answers"))


def _apart(values: Sequence[float]) -> list[float]:
    """Return those values that have room for a label on a logarithmic axis."""
    kept: list[float] = []
    for value in values:
        if not kept or value / kept[-1] > (values[-1] / values[0]) ** 0.12 + 0.02:
            kept.append(value)
    return kept


def _paired_differences(data: _Data) -> tuple[Figure | None, str]:
    shares = [unit for unit in data.shares if any(data.figure(name, unit, "difference") for name in data.candidates)]
    others = [unit for unit in data.others if any(data.figure(name, unit, "difference") for name in data.candidates)]
    if not shares and not others:
        return None, "No run has scores of single instances on both sides."
    kinds = [kind for kind in (shares, others) if kind]
    step = 0.24 * len(data.candidates) + 0.22
    figure = canvas(WIDTH, sum(len(kind) * step for kind in kinds) + 1.1 * len(kinds) + 0.5)
    panels = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=[len(kind) + 0.8 for kind in kinds]).ravel()
    for axes, kind in zip(panels, kinds, strict=True):
        points = kind is shares
        _forest(axes, data, kind, 100.0 if points else 1.0)
        what = (
            "points; to the left the candidate is worse" if points else f"{data.metrics[kind[0][1]]}; to the right it is worse"
        )
        axes.set_xlabel(f"difference to {short(data.baseline)} in {what}")
    _legend(figure, panels[0])
    merged = " Run entries of a group are shown together; the table has each." if data.merged else ""
    return figure, f"Mean paired difference with its 95 % cluster bootstrap.{merged}"


def _forest(axes: Any, data: _Data, units: Sequence[tuple[str, str]], scale: float) -> None:
    for row, unit in enumerate(units):
        for number, name in enumerate(data.candidates):
            found = data.figure(name, unit, "difference")
            if found is not None:
                value, low, high = (scale * each for each in found)
                bars = None if pd.isna(low) else spread(value, low, high)
                height = row + (number - (len(data.candidates) - 1) / 2) * 0.8 / len(data.candidates)
                axes.errorbar(
                    value, height, xerr=bars, capsize=3, linestyle="", label=short(name) if not row else None, **look(number)
                )
    axes.axvline(0, color=BASELINE, linewidth=1, linestyle="--")
    _rows(axes, data, units)


def _rows(axes: Any, data: _Data, units: Sequence[tuple[str, str]]) -> None:
    axes.set_yticks(range(len(units)), [data.label(unit) for unit in units])
    axes.set_ylim(len(units) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    for row in range(1, len(units)):
        axes.axhline(row - 0.5, color="#eeeeee", linewidth=0.8)


def _accuracy_against_throughput(data: _Data) -> tuple[Figure | None, str]:
    unit = next((unit for unit in data.shares[::-1] if data.score(data.baseline, unit)), None)
    if unit is None:
        return None, "No run has a score."
    names = [data.baseline, *data.candidates]
    found = {name: (data.figure(name, unit, "tokens_per_second"), data.score(name, unit)) for name in names}
    points = {name: (speed[0], score) for name, (speed, score) in found.items() if speed and score}
    if not points:
        return None, "No configuration has both a score and a measured speed."
    figure = canvas(WIDTH, 4.2)
    axes = figure.subplots()
    for name, (speed, (score, error)) in points.items():
        style = {"color": BASELINE, "marker": "o"} if name == data.baseline else look(data.candidates.index(name))
        axes.errorbar(speed, score, yerr=error, capsize=3, linestyle="", label=short(name), **style)
    front = _pareto([(speed, score) for speed, (score, _) in points.values()])
    axes.step(*zip(*front, strict=True), where="pre", color="#999999", linewidth=1, zorder=0, label="Pareto front")
    axes.set(xlabel="tokens/s (prompt tokens computed and generated)", ylabel="share of right answers", title=data.label(unit))
    axes.set_xlim(0, 1.08 * max(speed for speed, _ in points.values()))
    _legend(figure, axes)
    text = "The line joins the configurations that no other beats in both speed and score."
    return figure, text + _without([name for name in names if name not in points], "no speed was measured")


def _pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both coordinates, from left to right."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def _flips(data: _Data) -> tuple[Figure | None, str]:
    units = [unit for unit in data.shares if any(data.figure(name, unit, "lost") for name in data.candidates)]
    if not units:
        return None, "No run has scores of single instances on both sides."
    figure = canvas(WIDTH, len(units) * (0.24 * len(data.candidates) + 0.22) + 1.6)
    axes = figure.subplots()
    height = 0.8 / len(data.candidates)
    for row, unit in enumerate(units):
        for number, name in enumerate(data.candidates):
            found = [data.figure(name, unit, figure) for figure in ("lost", "gained", "instances")]
            if all(found):
                lost, gained, instances = (each[0] for each in found if each)
                at = row + (number - (len(data.candidates) - 1) / 2) * height
                first = not row and not number
                bar: dict[str, Any] = {"height": 0.85 * height, "edgecolor": "white", "linewidth": 0.4}
                axes.barh(at, -100 * lost / instances, color=LOST, label="lost" if first else None, **bar)
                axes.barh(at, 100 * gained / instances, color=GAINED, hatch="////", label="gained" if first else None, **bar)
                axes.annotate(short(name), (1.01, at), xycoords=("axes fraction", "data"), va="center", fontsize="small")
    axes.axvline(0, color=BASELINE, linewidth=1)
    _rows(axes, data, units)
    axes.set_xlabel("answers in per cent: lost to the left, gained to the right")
    _legend(figure, axes)
    return figure, "Answers that became wrong and answers that became right. Equal scores can hide many of both."


def _kl_tail(data: _Data) -> tuple[Figure | None, str]:
    unit = next(iter(data.shares[::-1] + data.others), None)
    found = {name: data.figure(name, unit, "kl_p999") for name in data.candidates} if unit else {}
    names = [name for name, value in found.items() if value and value[0] > 0]
    if unit is None or not names:
        zero = any(found.values())
        return None, "It is 0." if zero else "There is no result of `flexgen-helm fidelity` for these configurations."
    figure = canvas(WIDTH, 4.2)
    axes = figure.subplots()
    parts = {"kl_median": "median", "kl_mean": "mean", "kl_p99": "99 %", "kl_p999": "99.9 %"}
    for number, name in enumerate(data.candidates):
        if name not in names:
            continue
        for place, part in enumerate(parts):
            value = data.figure(name, unit, part)
            if value is not None and value[0] > 0:
                shift = place + (names.index(name) - (len(names) - 1) / 2) * 0.6 / len(names)
                bars = None if pd.isna(value[1]) else spread(*value)
                label = short(name) if not place else None
                axes.errorbar(shift, value[0], yerr=bars, capsize=3, linestyle="", label=label, **look(number))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the usual one needs mathtext
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(range(len(parts)), list(parts.values()))
    axes.set(ylabel="KL divergence from the baseline (nats)")
    _legend(figure, axes)
    text = "Divergence at the median token, on average, and at the worst 1 % and 0.1 % of tokens, with 95 % intervals."
    return figure, text + _without([name for name in data.candidates if name not in names], "no result of fidelity, or it is 0")


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, max(1, len(labels))))


def _without(names: Sequence[str], why: str) -> str:
    return f" Without {', '.join(names)}: {why}." if names else ""
