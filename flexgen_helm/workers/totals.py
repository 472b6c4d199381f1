"""What several workers measured, as one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flexgen_helm.run_stats import Forecast, RunStats


def together(parts: Sequence[RunStats]) -> RunStats:
    """Return the measurements of parts of a run that were computed at the same time on several devices.

    What was done is the sum over all parts, and so are seconds in which resources were busy. The run is as long as its
    longest part, and so is its limit. Memory is the most of any part.
    """
    parts = [part for part in parts if part.num_jobs]
    if not parts:
        return RunStats()
    if len(parts) == 1:
        return parts[0]
    limits, forecasts = [part.limit_seconds for part in parts], [part.predicted for part in parts]
    known = [limit for limit in limits if limit is not None]
    totals: dict[str, Any] = {
        **{name: sum(getattr(part, name) for part in parts) for name in _SUMS},
        **{name: max(getattr(part, name) for part in parts) for name in _MOST},
        **{name: _sums(getattr(part, name) for part in parts) for name in _SUMS_BY_NAME},
        **{name: _most(getattr(part, name) for part in parts) for name in _MOST_BY_NAME},
    }
    return replace(
        parts[0],
        **totals,
        limit_seconds=max(known) if len(known) == len(parts) else None,
        limit_unknown=next((part.limit_unknown for part in parts if part.limit_seconds is None), ""),
        per_sweep=[sweep for part in parts for sweep in part.per_sweep],
        predicted=_forecast([forecast for forecast in forecasts if forecast is not None], len(parts)),
    )


_SUMS = ("num_jobs", "prompt_tokens_asked", "prompt_tokens_computed", "generated_tokens", "sweeps")
_MOST = ("seconds", "peak_bytes", "idle_bytes")
_SUMS_BY_NAME = ("bytes_moved", "busy_seconds", "bytes_saved", "device_wait_seconds")
_MOST_BY_NAME = ("tier_peak_bytes", "least_seconds")


def _forecast(forecasts: Sequence[Forecast], parts: int) -> Forecast | None:
    if len(forecasts) < parts:
        return None
    return Forecast(
        forecasts[0].machine,
        max(forecast.seconds for forecast in forecasts),
        sum(forecast.sweeps for forecast in forecasts),
        _most(forecast.peak_bytes for forecast in forecasts),
        _sums(forecast.bytes_moved for forecast in forecasts),
        _sums(forecast.busy_seconds for forecast in forecasts),
    )


def _sums(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def _most(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    most: dict[str, Any] = {}
    for part in parts:
        most.update({name: max(value, most.get(name, value)) for name, value in part.items()})
    return most
