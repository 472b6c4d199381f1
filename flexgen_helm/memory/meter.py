"""Meter: measures the bytes that a run moves, the time that each resource is busy, and the most memory held."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from flexgen_helm.memory.spans.device_waits import device_waits, seconds_by_cause
from flexgen_helm.memory.spans.span import Activity, Span, covered_seconds
from flexgen_helm.memory.usage import PeakBytes
from flexgen_helm.run_stats import RunStats, SweepStats
from flexgen_helm.types import RESOURCES, Resource, Tier

ON_STREAM: frozenset[Resource] = frozenset({"device", "unpack", "host_to_device", "device_to_host"})
"""Resources whose work a GPU does on a stream, after the call that starts it has returned."""
_Mark = float | torch.cuda.Event
_Anchor = tuple[torch.cuda.Event | None, float]


class _Running:
    """A span whose end may not be known yet; times on a GPU are events after an anchor of known time."""

    def __init__(self, resource: Resource, activity: Activity, num_bytes: int, begin: _Mark, anchor: _Anchor) -> None:
        self.resource, self.activity, self.num_bytes = resource, activity, num_bytes
        self.begin: _Mark = begin
        self.end: _Mark | None = None
        self._anchor = anchor

    def times(self) -> tuple[float | None, float | None]:
        """Return begin and end in seconds; None for one that has not happened."""
        return self._seconds(self.begin), self._seconds(self.end)

    def _seconds(self, mark: _Mark | None) -> float | None:
        if not isinstance(mark, torch.cuda.Event):
            return mark
        event, seconds = self._anchor
        assert event is not None
        return seconds + event.elapsed_time(mark) / 1e3 if mark.query() else None


class Meter:
    """Measures the runs of one engine, sweep by sweep. Every method may be called from any thread."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        """Record only the memory held until `begin_run` is called.

        Args:
            device: Device whose memory and streams are measured.
            clock: Function that returns the time in seconds.
        """
        self.now = clock
        """Clock in seconds; `add` takes its times."""
        self.spans: list[Span] | None = None
        """Spans of the last run, one or more for every operation; recorded only if this was a list when the run began."""
        self._device = device
        self._lock = threading.Lock()
        self._arenas: dict[tuple[Tier, str], int] = {}
        self._peaks: dict[str, int] = {}
        self._running: list[_Running] = []
        self._computing: _Running | None = None
        self._saved: dict[str, int] = defaultdict(int)
        self._sweeps: list[SweepStats] | None = None
        self._begun = self._window = clock()
        self._anchor: _Anchor = (None, self._begun)
        self._memory: PeakBytes | None = None

    @contextmanager
    def span(self, resource: Resource, activity: Activity, num_bytes: int = 0) -> Iterator[None]:
        """Measure the body of a `with` statement as one span of a resource.

        On a GPU, times of the device and of its links are those of events on the current stream. Open a span
        after the stream was told what to wait for, in the thread and under the stream that does the work.

        Args:
            resource: Resource that is busy during the body.
            activity: Work that it does.
            num_bytes: Bytes that are moved, or that attention on the CPU reads.
        """
        span = self._start(resource, activity, num_bytes)
        if resource == "device":
            self._computing = span
        try:
            yield
        finally:
            if resource == "device" and self._computing is not None:
                span, self._computing = self._computing, None
            span.end = self._mark(resource)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the body of a `with` statement, in which a computation waits, as no work of the device.

        The device's span ends before it, and another one of the same activity begins behind it; where the device has none
        open, nothing happens. For the thread that computes.
        """
        span, self._computing = self._computing, None
        if span is None:
            yield
            return
        span.end = self._mark("device")
        try:
            yield
        finally:
            self._computing = self._start("device", span.activity, 0)

    def add(self, resource: Resource, activity: Activity, begin: float, end: float, num_bytes: int = 0) -> None:
        """Record a span that was timed elsewhere. The part of it before the current sweep does not count.

        Args:
            resource: Resource that was busy.
            activity: Work that it did.
            begin: Begin, a time of `now`.
            end: End, a time of `now`.
            num_bytes: Bytes that were moved.
        """
        span = _Running(resource, activity, num_bytes, begin, self._anchor)
        span.end = end
        self._note(span)

    def hold(self, tier: Tier, arena: str, num_bytes: int) -> None:
        """Record the memory that an arena holds on a tier from now on.

        Args:
            tier: Tier of the memory.
            arena: Name of its use, such as "weights" or "slots".
            num_bytes: Bytes held; 0 when it is freed.
        """
        with self._lock:
            self._arenas[tier, arena] = num_bytes
            held = sum(count for (place, _), count in self._arenas.items() if place == tier)
            self._peaks[tier] = max(self._peaks.get(tier, 0), held)

    def save(self, resource: Resource, num_bytes: int) -> None:
        """Count bytes that a resource would have moved without sparse attention.

        Args:
            resource: The resource.
            num_bytes: Bytes; below 0 for a part of earlier ones that is moved after all.
        """
        with self._lock:
            self._saved[resource] += num_bytes

    def begin_run(self) -> None:
        """Begin to measure a run: forget the run before it, keep the memory held."""
        with self._lock:
            self._running, self._sweeps, self._peaks = [], [], {}
            self._saved.clear()
            self.spans = None if self.spans is None else []
            for tier, _ in self._arenas:
                self._peaks[tier] = sum(count for (place, _), count in self._arenas.items() if place == tier)
            self._set_anchor()
            self._begun = self._window = self.now()
            self._memory = PeakBytes(self._device)

    def end_sweep(self, prompt_tokens: int, decode_tokens: int, generated_tokens: int) -> None:
        """End the measurement of a sweep, which began at the end of the sweep before. Spans that still run count until now.

        Args:
            prompt_tokens: Tokens that went through the layers in prefill rows.
            decode_tokens: Tokens that went through the layers in decode rows.
            generated_tokens: Tokens that were chosen at the end of the sweep, for all completions.
        """
        with self._lock:
            if self._sweeps is None or self._memory is None:
                return
            self._memory.sample()
            now = self.now()
            begin, end = self._window - self._begun, now - self._begun
            done, busy = self._sort(now)
            intervals: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
            for span in busy:
                intervals[span.resource].append((span.begin, span.end))
            seconds = {name: covered_seconds(found, begin, end) for name, found in intervals.items()}
            moved = _sums(done), _sums(span for span in done if span.activity.kind == "load_weights")
            tokens = prompt_tokens, decode_tokens, generated_tokens
            waits = seconds_by_cause(device_waits(busy, begin, end))
            self._sweeps.append(SweepStats(begin, end - begin, *tokens, *moved, seconds, waits))
            if self.spans is not None:
                self.spans += done
            self._window = now
            self._set_anchor()

    def end_run(self, stats: RunStats) -> None:
        """End the run and write everything measured since `begin_run` into its stats."""
        with self._lock:
            stats.per_sweep, self._sweeps, self._running = self._sweeps or [], None, []
            stats.tier_peak_bytes = dict(self._peaks)
        if self._memory is not None:
            stats.peak_bytes, stats.idle_bytes = self._memory.bytes(), self._memory.begun
        for name in RESOURCES:
            moved = sum(sweep.bytes_moved.get(name, 0) for sweep in stats.per_sweep)
            busy = sum(sweep.busy_seconds.get(name, 0.0) for sweep in stats.per_sweep)
            stats.bytes_moved |= {name: moved} if moved else {}
            stats.bytes_saved |= {name: self._saved[name]} if name in self._saved and (moved or self._saved[name]) else {}
            stats.busy_seconds |= {name: busy} if busy else {}
        for sweep in stats.per_sweep:
            for cause, seconds in sweep.device_wait_seconds.items():
                stats.device_wait_seconds[cause] = stats.device_wait_seconds.get(cause, 0.0) + seconds

    def _note(self, span: _Running) -> None:
        with self._lock:
            if self._sweeps is not None:
                self._running.append(span)

    def _sort(self, now: float) -> tuple[list[Span], list[Span]]:
        """Remove and return the spans that have ended; and return them with those that still run, as if they ended now."""
        done, busy = list[Span](), list[Span]()
        running, self._running = self._running, []
        for span in running:
            begin, end = span.times()
            if begin is not None:
                last = (now if end is None else end) - self._begun
                busy.append(Span(span.resource, span.activity, begin - self._begun, last, span.num_bytes))
            if begin is None or end is None:
                self._running.append(span)
            else:
                done.append(busy[-1])
        return done, busy

    def _start(self, resource: Resource, activity: Activity, num_bytes: int) -> _Running:
        anchor = self._anchor  # first: no begin may be before it
        span = _Running(resource, activity, num_bytes, self._mark(resource), anchor)
        self._note(span)
        return span

    def _mark(self, resource: Resource) -> _Mark:
        if self._device.type != "cuda" or resource not in ON_STREAM:
            return self.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _set_anchor(self) -> None:
        """Relate the GPU's time to the host's; repeated for each sweep, because an event's time has only 24 bits."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            event.synchronize()
            self._anchor = (event, self.now())


def _sums(spans: Iterable[Span]) -> dict[str, int]:
    sums: dict[str, int] = defaultdict(int)
    for span in spans:
        if span.num_bytes:
            sums[span.resource] += span.num_bytes
    return dict(sums)
