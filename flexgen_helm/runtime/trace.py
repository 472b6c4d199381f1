"""Timeline of a run in Chrome's trace event format, which https://ui.perfetto.dev opens."""

from __future__ import annotations

import heapq
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_helm.errors import FlexGenError
from flexgen_helm.memory.spans.device_waits import Wait, device_waits
from flexgen_helm.memory.spans.span import Span
from flexgen_helm.run_stats import SweepStats
from flexgen_helm.types import RESOURCES

if TYPE_CHECKING:
    from flexgen_helm.runtime.engine import Engine

PROCESS = 1
ROWS_EACH = 100
"""Row numbers reserved for each resource in the timeline; they also order the resources."""
WAITS_ROW = ROWS_EACH - 1
"""Row of the device's waits, above the device."""


@contextmanager
def traced(engine: Engine, path: Path | None) -> Iterator[None]:
    """Write the timeline of the run in the body of a `with` statement into a file.

    Args:
        engine: Engine that runs.
        path: File, which is replaced; None: write nothing.

    Raises:
        FlexGenError: If the file cannot be written; raised before the run.
    """
    if path is None:
        yield
        return
    write_trace(path, [], [])
    engine.meter.spans = []
    try:
        yield
        write_trace(path, engine.meter.spans, engine.stats.per_sweep)
    finally:
        engine.meter.spans = None


def write_trace(path: Path, spans: Sequence[Span], sweeps: Sequence[SweepStats]) -> None:
    """Write a timeline of spans and sweeps into a file.

    Args:
        path: File, which is replaced.
        spans: Spans of the run.
        sweeps: Measurements of the run's sweeps.

    Raises:
        FlexGenError: If the file cannot be written.
    """
    events = _sweep_events(sweeps) + _wait_events(spans, sweeps)
    for i, resource in enumerate(RESOURCES, start=1):
        events += _resource_events(resource, ROWS_EACH * i, [span for span in spans if span.resource == resource])
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise FlexGenError(f"The trace {path} cannot be written ({error}). Give another file.") from None


def title(resource: str) -> str:
    """Return the name of a resource for people, such as "disk read"."""
    return resource.replace("_", " ")


def _sweep_events(sweeps: Sequence[SweepStats]) -> list[dict[str, Any]]:
    events = [*_row_names(0, "sweeps")]
    for number, sweep in enumerate(sweeps, start=1):
        busy = {f"{title(name)} busy": round(seconds, 6) for name, seconds in sweep.busy_seconds.items()}
        tokens = {"prompt tokens": sweep.prompt_tokens, "generated tokens": sweep.generated_tokens}
        arguments = {"bound by": sweep.bound_by and title(sweep.bound_by), **tokens, **busy}
        events.append(_event(f"sweep {number}", "sweep", 0, sweep.begin, sweep.begin + sweep.seconds, arguments))
    return events


def _wait_events(spans: Sequence[Span], sweeps: Sequence[SweepStats]) -> list[dict[str, Any]]:
    waits = list(_waits(spans, sweeps)) if spans else []
    events = [*_row_names(WAITS_ROW, "device waits")] if waits else []
    for wait in waits:
        events.append(_event(wait.what, "device_waits", WAITS_ROW, wait.begin, wait.end, {"cause": title(wait.cause)}))
    return events


def _waits(spans: Sequence[Span], sweeps: Sequence[SweepStats]) -> Iterator[Wait]:
    """Yield the device's waits, sweep by sweep."""
    later, busy = deque(sorted(spans, key=lambda span: span.begin)), list[Span]()
    for sweep in sweeps:
        end = sweep.begin + sweep.seconds
        while later and later[0].begin < end:
            busy.append(later.popleft())
        yield from device_waits(busy, sweep.begin, end)
        busy = [span for span in busy if span.end > end]


def _resource_events(resource: str, first_row: int, spans: list[Span]) -> list[dict[str, Any]]:
    """Spread spans over several rows of the timeline, because spans in one row must not overlap."""
    events: list[dict[str, Any]] = []
    free: list[tuple[float, int]] = []
    num_rows = 0
    for span in sorted(spans, key=lambda span: span.begin):
        if free and free[0][0] <= span.begin:
            _, row = heapq.heappop(free)
        else:
            row, num_rows = num_rows, num_rows + 1
            events += _row_names(first_row + row, title(resource) + (f" ({row + 1})" if row else ""))
        heapq.heappush(free, (span.end, row))
        arguments = {"bytes": span.num_bytes} if span.num_bytes else {}
        events.append(_event(str(span.activity), resource, first_row + row, span.begin, span.end, arguments))
    return events


def _row_names(row: int, name: str) -> Iterable[dict[str, Any]]:
    for kind, arguments in (("thread_name", {"name": name}), ("thread_sort_index", {"sort_index": row})):
        yield {"ph": "M", "name": kind, "pid": PROCESS, "tid": row, "args": arguments}


def _event(name: str, category: str, row: int, begin: float, end: float, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a complete event. Times are microseconds, rounded to nanoseconds so that neighbours do not overlap."""
    since, until = round(begin * 1e9), round(end * 1e9)
    times = {"ts": since / 1e3, "dur": (until - since) / 1e3}
    return {"ph": "X", "name": name, "cat": category, "pid": PROCESS, "tid": row, **times, "args": arguments}
