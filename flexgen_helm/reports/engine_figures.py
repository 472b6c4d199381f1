"""Figures of the engine and of fidelity, which do not depend on single answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flexgen_helm.reports.engine_record import CACHE_BITS, NO_RECORD, NOTHING_COMPUTED, EngineRecord
from flexgen_helm.reports.fidelity_results import NONE_FOUND, FidelityResult

TIERS = ("device", "host", "disk")
NOT_RECORDED = "the record of the engine does not have it"
FIDELITY: dict[str, tuple[str, ...]] = {
    "kl_mean": ("kl", "mean"),
    "kl_median": ("kl", "median"),
    "kl_p99": ("kl", "p99"),
    "kl_p999": ("kl", "p999"),
    "top1_agreement": ("top1_agreement",),
    "delta_p_mean": ("delta_p", "mean"),
    "delta_p_rms": ("delta_p", "rms"),
    "perplexity_ratio": ("perplexity_ratio",),
}
"""Figures of a result of fidelity, by where they are in it."""


class Cell(NamedTuple):
    """A figure: a value, or the reason why there is none."""

    figure: str
    value: float = math.nan
    low: float = math.nan
    """Bound of a 95 % interval; NaN: there is none."""
    high: float = math.nan
    note: str = ""
    """The reason where the value is NaN; else what must be known of it."""

    @classmethod
    def of(
        cls, figure: str, value: float | None, reason: str, interval: tuple[float, float] | None = None, *, note: str = ""
    ) -> Cell:
        """Make a cell of a value that may be missing.

        Args:
            figure: Its name.
            value: None: missing.
            reason: Why, where it is missing.
            interval: 95 %.
            note: What must be known of it, where it is there.
        """
        if value is None or math.isnan(value):
            return cls(figure, note=reason)
        return cls(figure, float(value), *(interval or (math.nan, math.nan)), note)


def engine_cells(engines: Sequence[EngineRecord | None]) -> Iterator[Cell]:
    """Yield bits, bytes and speed of the engines that served some runs.

    Args:
        engines: One for each run; None where a run has no record. At least one.
    """
    known = [engine for engine in engines if engine is not None]
    reason = NO_RECORD if len(known) < len(engines) else NOT_RECORDED
    if len(known) < len(engines):
        known = []
    compressed = "nothing is compressed" if known and all(engine.variant is None for engine in known) else reason
    yield _common("bits", [engine.bits for engine in known], reason)
    yield _common("bits_per_weight", [engine.bits_per_weight for engine in known], reason)
    yield _common("bits_per_compressed_weight", [engine.bits_per_compressed_weight for engine in known], compressed)
    for name in CACHE_BITS:
        yield _common(name, [getattr(engine, name) for engine in known], reason)
    for tier in TIERS:
        yield _common(f"weight_bytes_{tier}", [engine.weight_bytes.get(tier) for engine in known], reason)
    for tier in TIERS:
        yield _common(f"cache_bytes_{tier}", [engine.cache_bytes.get(tier) for engine in known], reason)
    yield from _speed(known, reason)


def _common(figure: str, values: Sequence[float | None], reason: str) -> Cell:
    different = set(values)
    if len(different) > 1:
        return Cell(figure, note="differs between the runs")
    return Cell.of(figure, next(iter(different), None), reason)


def _speed(engines: Sequence[EngineRecord], reason: str) -> Iterator[Cell]:
    # Runs that were served together share one measurement.
    measured = {engine.throughput.date: engine.throughput for engine in engines if engine.throughput is not None}
    if not measured:
        why = NOTHING_COMPUTED if engines else reason
        yield from (Cell(name, note=why) for name in ("tokens_per_second", "limit_share"))
        return
    seconds = sum(each.seconds for each in measured.values())
    note = "of all requests that were computed together"
    yield Cell("tokens_per_second", sum(each.tokens for each in measured.values()) / seconds, note=note)
    shares = [(each.limit_share, each.seconds) for each in measured.values() if each.limit_share is not None]
    if len(shares) < len(measured):
        yield Cell("limit_share", note="the limit of the machine is not known")
    else:
        yield Cell("limit_share", sum(share * time for share, time in shares) / seconds, note=note)


def fidelity_cells(result: FidelityResult | None, baseline: EngineRecord | None, candidate: EngineRecord | None) -> list[Cell]:
    """Return the figures of a result of fidelity, or why there is none."""
    if result is None:
        reason = NO_RECORD if baseline is None or candidate is None else NONE_FOUND
        return [Cell(name, note=reason) for name in FIDELITY]
    sides = {"reference": baseline, "candidate": candidate}
    exact = all(engine is not None and result.numerics(side) == engine.numerics for side, engine in sides.items())
    text = f"{result.positions:,} predictions of {result.content['text'].get('source', 'a text')}"
    note = text if exact else f"{text}; with other row sizes or kernels"
    cells = []
    for name, path in FIDELITY.items():
        value, interval = result.figure(*path)
        cells.append(Cell.of(name, value, NONE_FOUND, interval, note=note))
    return cells
