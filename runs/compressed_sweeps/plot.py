"""The plot: seconds of a sweep against the bytes that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from flexgen_helm.fidelity.plot import check_matplotlib
from flexgen_helm.runs.compressed_sweeps.variants import Line


def draw(file: Path, lines: Sequence[Line]) -> None:
    """Write a PNG with a point for each variant, and the time that direct reads of as many bytes take.

    Raises:
        FlexGenError: If matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    axes = figure.subplots()
    sizes, seconds = [line.read_bytes / 2**30 for line in lines], [line.seconds for line in lines]
    spread = [[line.seconds - line.fastest for line in lines], [line.slowest - line.seconds for line in lines]]
    rate = median(line.disk_rate for line in lines)
    axes.plot([0, max(sizes)], [0, max(sizes) * 2**30 / rate], color="0.6", label=f"direct reads, {rate / 1e9:.2f} GB/s")
    axes.errorbar(sizes, seconds, yerr=spread, fmt="o", capsize=3, label="sweep, median and range")
    axes.plot(sizes, [line.unpack_seconds for line in lines], "x", color="tab:red", label="of it unpacking")
    for line, size, time in zip(lines, sizes, seconds, strict=True):
        axes.annotate(line.variant, (size, time), textcoords="offset points", xytext=(6, 6))
    axes.set(xlabel="GiB read in a sweep", ylabel="seconds", xlim=(0, max(sizes) * 1.15), ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=3)  # within the axes it would hide points
    figure.savefig(file, format="png", dpi=120)
