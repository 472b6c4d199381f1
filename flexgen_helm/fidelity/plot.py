"""The plot of a comparison, as a PNG."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexgen_helm.errors import FlexGenError

SMALLEST = 1e-12
"""KL divergences below are drawn here, because the axis is logarithmic."""


def check_matplotlib() -> None:
    """Check that plots can be drawn.

    Raises:
        FlexGenError: If matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise FlexGenError('The plot needs matplotlib. Install it with `pip install "flexgen_helm[helm]"`, or give --no-plot.')


def draw(file: Path, result: dict[str, Any], kl: NDArray[np.float64]) -> None:
    """Write a PNG of two panels: which share of the predictions has a larger KL divergence, and its mean by confidence.

    Args:
        file: The PNG; its folder exists.
        result: The figures.
        kl: KL divergence of each position in nats, ``[N]``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    left, right = figure.subplots(1, 2)
    _draw_shares(left, kl, result)
    _draw_buckets(right, result)
    weights = [result[side]["numerics"]["weights"] for side in ("candidate", "reference")]
    names = [
        f"{Path(result[side]['model']).name} ({each['dtype']}, {each['scheme']})"
        for side, each in zip(("candidate", "reference"), weights, strict=True)
    ]
    figure.suptitle(f"{names[0]} against {names[1]}", fontsize="medium")
    figure.savefig(file, format="png", dpi=120)


def _draw_shares(axes: Any, kl: NDArray[np.float64], result: dict[str, Any]) -> None:
    from matplotlib.ticker import NullFormatter

    ordered = np.maximum(np.sort(kl), SMALLEST)
    axes.step(ordered, 1 - np.arange(len(ordered)) / len(ordered), where="pre")
    axes.axvline(max(result["kl"]["mean"], SMALLEST), color="tab:red", linestyle="--", label="mean")
    axes.set(xscale="log", yscale="log", xlabel="KL divergence (nats)", ylabel="share of predictions with at least this")
    axes.xaxis.set_minor_formatter(NullFormatter())  # labels would overlap
    axes.legend()


def _draw_buckets(axes: Any, result: dict[str, Any]) -> None:
    buckets = result["kl_by_confidence"]
    means = np.array([bucket["kl_mean"] for bucket in buckets])
    bounds = [bucket["ci95"]["kl_mean"] or (mean, mean) for bucket, mean in zip(buckets, means, strict=True)]
    low, high = np.array(bounds).T
    spread = np.maximum([means - low, high - means], 0)
    axes.bar(range(len(buckets)), means, yerr=spread, capsize=3, color="tab:blue")
    axes.set_xticks(range(len(buckets)), [f"{bucket['from']:g} to\n{bucket['to']:g}" for bucket in buckets])
    axes.set(xlabel="probability of the reference's most likely token", ylabel="mean KL divergence (nats)")
