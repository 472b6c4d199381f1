"""Results of ``flexgen-helm fidelity``, found by the numerics of both sides."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_helm.cache_folder import cache_folder
from flexgen_helm.errors import CorruptFile
from flexgen_helm.reports.engine_record import EngineRecord

DECIDING = ("weights", "cache")
"""Parts of the numerics that must agree. The others (row sizes, kernels) change results by rounding alone."""
NONE_FOUND = "no result of `flexgen-helm fidelity` for these two"


@dataclass(frozen=True)
class FidelityResult:
    """A file of results."""

    file: Path
    content: Mapping[str, Any]
    """As ``flexgen-helm fidelity --json`` prints it."""

    @property
    def positions(self) -> int:
        """Number of predictions that were compared."""
        return int(self.content["text"]["positions"])

    def numerics(self, side: str) -> Mapping[str, Any]:
        """Return the numerics of ``reference`` or ``candidate``."""
        return dict(self.content[side]["numerics"])

    def figure(self, *path: str) -> tuple[float, tuple[float, float] | None]:
        """Return a figure and its 95 % interval, such as of ``kl``, ``mean``."""
        value, interval = self.content, self.content["ci95"]
        for name in path:
            value, interval = value[name], interval[name]
        return float(value), None if interval is None else (float(interval[0]), float(interval[1]))  # type: ignore[arg-type]


def read_fidelity(files: Sequence[Path] | None) -> list[FidelityResult]:
    """Read results.

    Args:
        files: Files that `flexgen-helm fidelity` kept; None: all that are in the cache folder.

    Raises:
        CorruptFile: A file that was named cannot be read, or is no such result. Others in the cache folder are left out.
    """
    if files is not None:
        return [_read(file) for file in files]
    found = []
    for file in sorted((cache_folder() / "fidelity").glob("*.json")):
        try:
            found.append(_read(file))
        except CorruptFile:
            continue  # nobody asked for it
    return found


def _read(file: Path) -> FidelityResult:
    try:
        result = FidelityResult(file, json.loads(file.read_text(encoding="utf-8")))
        paths = (("kl", "mean"), ("kl", "median"), ("kl", "p99"), ("kl", "p999"), ("top1_agreement",), ("perplexity_ratio",))
        for path in (*paths, ("delta_p", "mean"), ("delta_p", "rms")):
            result.figure(*path)
        for side in ("reference", "candidate"):
            if not {*DECIDING} <= result.numerics(side).keys():
                raise KeyError(f"numerics of the {side}")
        if result.positions < 1:
            raise ValueError("nothing was compared")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CorruptFile(
            f"{file} cannot be read as a result of fidelity ({type(error).__name__}: {error}). Name a file that "
            "`flexgen-helm fidelity` kept, or run it again."
        ) from error
    return result


def find_fidelity(
    results: Iterable[FidelityResult], baseline: EngineRecord | None, candidate: EngineRecord | None
) -> FidelityResult | None:
    """Return the result for two engines; of several the one with equal row sizes and kernels, then that of the longest text."""
    if baseline is None or candidate is None:
        return None
    sides = {"reference": baseline.numerics, "candidate": candidate.numerics}
    fitting = [
        result
        for result in results
        if all(result.numerics(side)[part] == ours.get(part) for side, ours in sides.items() for part in DECIDING)
    ]
    return max(
        fitting,
        key=lambda result: (all(result.numerics(side) == ours for side, ours in sides.items()), result.positions),
        default=None,
    )
