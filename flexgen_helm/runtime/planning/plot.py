"""Plots of a plan: the latency-throughput frontier (the paper's Fig. 1), and the timeline of one sweep."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flexgen_helm.errors import FlexGenError
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.fluid import Span
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.search.choice import Choice
from flexgen_helm.policy.planner.search.choose import Problem
from flexgen_helm.policy.planner.search.frontier import frontier
from flexgen_helm.policy.planner.simulate import timeline
from flexgen_helm.policy.planner.sweeps import sweep_loads

MIDDLE_SWEEP = 8
"""Sweep whose timeline is drawn, if there are as many: prompts and decoding are both in it."""


def draw(folder: Path, problem: Problem, choice: Choice) -> Iterator[Path]:
    """Write both plots as PNG files, and yield each file once it is there.

    Args:
        folder: Folder of the files; made if it is missing.
        problem: What was searched for.
        choice: What was found.

    Raises:
        FlexGenError: If matplotlib is missing, or a file cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise FlexGenError('Plots need matplotlib. Install it with `pip install "flexgen_helm[helm]"`, or leave --plot out.')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield _frontier(folder / "frontier.png", frontier(problem), choice)
        yield _timeline(folder / "timeline.png", problem, choice)
    except OSError as error:
        raise FlexGenError(f"The plots cannot be written to {folder} ({error}). Give another folder to --plot.") from error


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    axes = figure.subplots()
    axes.set_title(title, fontsize="medium")
    return figure, axes


def _frontier(file: Path, points: Sequence[Prediction], choice: Choice) -> Path:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = _figure("Predicted throughput by latency")
    axes.plot([p.latency_seconds for p in points], [p.tokens_per_second for p in points], marker="o", label="best policies")
    same = choice.default is choice.prediction  # one star would hide the other
    for made, name in ((choice.prediction, "chosen: the default" if same else "chosen"), (choice.default, "default")):
        if made is not None and not (same and name == "default"):
            axes.plot(made.latency_seconds, made.tokens_per_second, marker="*", linestyle="none", markersize=12, label=name)
    axes.set(xscale="log", yscale="log", xlabel="seconds until the first answer", ylabel="tokens per second")
    for axis in (axes.xaxis, axes.yaxis):  # 200 rather than 2 x 10^2
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.legend()
    figure.savefig(file, format="png", dpi=120)
    return file


def _timeline(file: Path, problem: Problem, choice: Choice) -> Path:
    plan = MemoryPlan.of(problem.shapes, choice.policy, problem.space)
    loads = sweep_loads(plan, problem.workload)
    load = list(itertools.islice(loads, MIDDLE_SWEEP))[-1]
    spans = timeline(plan, load, problem.profile)
    figure, axes = _figure(f"One sweep: {load.prompt_tokens} prompt tokens, {load.generated_tokens} new tokens")
    names = sorted({span.resource for span in spans}, reverse=True)
    for row, name in enumerate(names):
        axes.broken_barh(_bars(spans, name), (row - 0.4, 0.8))
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="seconds")
    figure.savefig(file, format="png", dpi=120)
    return file


def _bars(spans: Sequence[Span], resource: str) -> list[tuple[float, float]]:
    return [(span.begin, span.end - span.begin) for span in spans if span.resource == resource]
