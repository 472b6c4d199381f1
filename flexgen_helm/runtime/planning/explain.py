"""The command `flexgen-helm plan --replay`: what was predicted for a run that is over, what was measured, and what was off."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flexgen_helm.errors import FlexGenError
from flexgen_helm.memory.amounts import gib
from flexgen_helm.run_stats import Forecast
from flexgen_helm.types import RESOURCES, TIERS

ALIKE = 0.02
"""Part by which bytes may differ and still count as predicted."""


@dataclass(frozen=True)
class Use:
    """What a resource was predicted to do and did.

    Attributes:
        resource: Name of the resource.
        predicted_seconds: Seconds in which it was to be busy.
        measured_seconds: Seconds in which it was.
        predicted_bytes: Bytes that it was to move; 0: it moves none.
        measured_bytes: Bytes that it moved.
    """

    resource: str
    predicted_seconds: float
    measured_seconds: float
    predicted_bytes: int
    measured_bytes: int

    @property
    def cause(self) -> str:
        """Reason of the difference, in words."""
        if not self.predicted_bytes or not self.measured_bytes or not self.predicted_seconds or not self.measured_seconds:
            return ""
        ratio = self.measured_bytes / self.predicted_bytes
        if abs(ratio - 1) > ALIKE:
            return f"it moved {abs(ratio - 1):.1%} {'more' if ratio > 1 else 'fewer'} bytes"
        rates = self.measured_bytes / self.measured_seconds, self.predicted_bytes / self.predicted_seconds
        return f"it moved {rates[0] / 1e9:.2f} GB/s, where {rates[1] / 1e9:.2f} GB/s were predicted"


@dataclass(frozen=True)
class Replayed:
    """A run that is over.

    Attributes:
        title: Name of the model or deployment, and the date.
        policy: Policy of the run, in plain types.
        predicted: What was expected.
        stats: What was measured, as `RunStats.as_dict` returns it.
    """

    title: str
    policy: Mapping[str, Any]
    predicted: Forecast
    stats: Mapping[str, Any]

    @property
    def error(self) -> float:
        """Predicted over measured time, less 1."""
        return float(self.predicted.seconds / self.stats["seconds"] - 1)

    @property
    def uses(self) -> list[Use]:
        """Every resource that was busy or was to be."""
        busy, moved = self.stats["busy_seconds"], self.stats["bytes_moved"]
        expected = self.predicted
        return [
            Use(
                name,
                expected.busy_seconds.get(name, 0.0),
                busy.get(name, 0.0),
                expected.bytes_moved.get(name, 0),
                moved.get(name, 0),
            )
            for name in RESOURCES
            if expected.busy_seconds.get(name) or busy.get(name)
        ]

    @property
    def most_off(self) -> Use | None:
        """Resource whose busy time was off by most seconds."""
        return max(self.uses, key=lambda use: abs(use.predicted_seconds - use.measured_seconds), default=None)

    @property
    def bound_by(self) -> str:
        """Resource that was busy longest."""
        busy: Mapping[str, float] = self.stats["busy_seconds"]
        return max(busy, key=busy.__getitem__, default="none")


def run_replay(file: Path, *, as_json: bool) -> int:
    """Explain a run.

    Args:
        file: ``flexgen.json`` of a run, or what `bench --json` printed.
        as_json: Whether one JSON object is printed.

    Raises:
        FlexGenError: If the file is no such record, or has no prediction.
    """
    run = read_run(file)
    print(json.dumps(to_json(run)) if as_json else "\n".join(lines(run)))
    return 0


def read_run(file: Path) -> Replayed:
    """Read the record of a run.

    Raises:
        FlexGenError: If it cannot be read, is no such record, or has no prediction.
    """
    wanted = "Give flexgen.json from a run's folder, or what `flexgen-helm bench --json` printed."
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FlexGenError(f"The record of a run {file} cannot be read ({error}). {wanted}") from None
    try:
        measured = record.get("measured", record)
        if measured is None:
            raise FlexGenError(f"In the run of {file} nothing was computed: all answers were known. Give another run.")
        stats = measured["stats"]
        predicted = stats.get("predicted")
        title = " ".join(
            str(each) for each in (record.get("deployment", record.get("model")), measured.get("date", "")) if each
        )
        policy = record.get("policy") or record["engine"]["policy"]
        seconds, _, _ = stats["seconds"], stats["busy_seconds"], stats["bytes_moved"]
    except (KeyError, TypeError, AttributeError):
        raise FlexGenError(f"{file} is not the record of a run. {wanted}") from None
    if predicted is None or not seconds:
        raise FlexGenError(
            f"The run of {file} was not predicted: everything fitted on the device, or its policy was not searched. "
            "`flexgen-helm plan --model M` predicts one."
        )
    known = {field.name for field in fields(Forecast)}
    return Replayed(title, policy, Forecast(**{name: value for name, value in predicted.items() if name in known}), stats)


def to_json(run: Replayed) -> dict[str, Any]:
    """Return an explanation in plain types."""
    return {
        "title": run.title,
        "policy": dict(run.policy),
        "machine": run.predicted.machine,
        "predicted_seconds": run.predicted.seconds,
        "measured_seconds": run.stats["seconds"],
        "error": run.error,
        "predicted_sweeps": run.predicted.sweeps,
        "measured_sweeps": run.stats["sweeps"],
        "predicted_binding": run.predicted.binding,
        "measured_binding": run.bound_by,
        "predicted_peak_bytes": run.predicted.peak_bytes,
        "measured_peak_bytes": run.stats.get("tier_peak_bytes", {}),
        "resources": [{**asdict(use), "cause": use.cause} for use in run.uses],
    }


def lines(run: Replayed) -> list[str]:
    """Return an explanation as lines for a reader."""
    return list(_lines(run))


def _lines(run: Replayed) -> Iterator[str]:
    predicted, stats = run.predicted, run.stats
    yield run.title
    yield f"policy: {', '.join(f'{name}={value}' for name, value in run.policy.items())}"
    yield (
        f"predicted for {predicted.machine}: {predicted.seconds:.3g} s in {predicted.sweeps:,} sweeps; "
        f"measured: {stats['seconds']:.3g} s in {stats['sweeps']:,} sweeps"
    )
    yield f"the prediction was {abs(run.error):.1%} {'more' if run.error > 0 else 'less'} than what was measured"
    yield f"busy longest: predicted {_words(predicted.binding)}, measured {_words(run.bound_by)}"
    yield f"{'':16}{'busy s':>20}{'bytes':>26}"
    yield f"{'resource':16}{'predicted':>10}{'measured':>10}{'predicted':>13}{'measured':>13}"
    for use in run.uses:
        counts = [gib(count) if count else "" for count in (use.predicted_bytes, use.measured_bytes)]
        yield (
            f"{_words(use.resource):16}{use.predicted_seconds:>10.2f}{use.measured_seconds:>10.2f}{counts[0]:>13}{counts[1]:>13}"
        ).rstrip()
    yield from _peaks(run)
    worst = run.most_off
    if worst is not None:
        off = worst.measured_seconds - worst.predicted_seconds
        cause = f": {worst.cause}" if worst.cause else ""
        more = "longer" if off > 0 else "less"
        yield f"most off: {_words(worst.resource)}, busy {abs(off):.3g} s {more} than predicted{cause}"


def _peaks(run: Replayed) -> Iterator[str]:
    measured: Mapping[str, int] = run.stats.get("tier_peak_bytes", {})
    for tier in TIERS:
        if run.predicted.peak_bytes.get(tier) or measured.get(tier):
            planned, found = gib(run.predicted.peak_bytes.get(tier, 0)), gib(measured.get(tier, 0))
            yield f"most bytes on the {tier}: {planned} predicted, {found} measured"


def _words(name: str) -> str:
    return name.replace("_", " ")
