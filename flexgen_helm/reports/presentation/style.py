"""Colours, markers and canvases of plots: distinguishable without colour vision, and drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito (2008), without the yellow, which is pale on white; the baseline is grey."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
BASELINE = "#555555"
LOST, GAINED = "#D55E00", "#0072B2"
SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.hashsalt": "flexgen_helm",
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
NAME = 34
"""Characters of a name in a plot, before it is cut."""


def look(number: int) -> dict[str, Any]:
    """Return colour and marker of the candidate with this number. Both repeat with different periods."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def short(name: str) -> str:
    """Return a name that fits: without control characters, its end kept, where names of runs differ."""
    plain = "".join(letter if letter.isprintable() else " " for letter in name)
    return plain if len(plain) <= NAME else f"{plain[: NAME // 3]}…{plain[-(NAME - NAME // 3 - 1) :]}"


def canvas(width: float, height: float) -> Figure:
    """Return an empty figure in inches. Draw inside of ``mpl.rc_context(SETTINGS)``."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def saved(figure: Figure) -> dict[str, bytes]:
    """Return the figure as ``png`` and ``svg``, the same bytes for the same figure."""
    found = {}
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=120, metadata=metadata)
        found[kind] = stream.getvalue()
    return found


def settings() -> Any:
    """Return a context in which plots are drawn."""
    return mpl.rc_context(SETTINGS)


def spread(value: float, low: float, high: float) -> Sequence[Sequence[float]]:
    """Return an interval as matplotlib's error bar."""
    return [[max(value - low, 0.0)], [max(high - value, 0.0)]]
