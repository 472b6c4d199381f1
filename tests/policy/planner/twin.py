"""The twin of the simulator: the real executors, weight store and hidden store on a virtual clock with paced links.

Nothing sleeps. Threads are greenlets: one that waits lets the others go on until time, which jumps from event to event, has
brought what it waits for. Rows compute nothing; layer calls, embeddings and output head take the seconds that they are given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flexgen_helm.execution.overlapped import OverlappedExecutor
from flexgen_helm.execution.serial import SerialExecutor
from flexgen_helm.kv_cache.pages import NUM_BUFFERS
from flexgen_helm.memory import hidden_store, weight_store
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.hidden_store import HiddenStore
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.spans.span import Activity, ActivityKind
from flexgen_helm.memory.weight_store import Unit, WeightStore
from flexgen_helm.policy.planner.durations import Durations, Stage
from flexgen_helm.policy.planner.loads import RowLoad, SweepLoad
from flexgen_helm.run_stats import RunStats, SweepStats
from flexgen_helm.schedule.operations import Order
from flexgen_helm.schedule.rows import LogitRequest, Row, Segment, Sweep
from flexgen_helm.types import ON_DEVICE, Resource
from tests.policy.planner.virtual_clock import Clock, PacedQueue, Promise


class PacedMeter(Meter):
    """A meter whose spans take the time of their bytes. What it is not told of is free, or paid for elsewhere."""

    def __init__(self, clock: Clock, durations: Durations) -> None:
        super().__init__(torch.device("cpu"), lambda: clock.now)
        self._clock, self._durations = clock, durations

    @contextmanager
    def span(self, resource: Any, activity: Any, num_bytes: int = 0) -> Iterator[None]:
        with super().span(resource, activity, num_bytes):
            yield
            self._pay(resource, num_bytes)

    def _pay(self, resource: Any, num_bytes: int) -> None:
        if not num_bytes:
            return
        rates, own_memory = self._durations.profile, self._durations.plan.space.own_memory
        ways = [resource]
        if own_memory and resource == "disk_write":  # hidden states on disk; that they cross the link is not measured
            ways = ["device_to_host", resource]
        if own_memory and resource == "disk_read":
            ways = [resource, "host_to_device"]
        for way in ways:
            self._clock.spend(Stage(way, num_bytes / getattr(rates, way).value, 0, way))


@dataclass(frozen=True)
class Layout:
    num_bytes: int


@dataclass(frozen=True)
class PacedFormat:
    """Slabs that take time to decode and to unpack."""

    stored: Layout
    carried: Layout
    bound: Layout
    is_coded: bool
    is_packed: bool
    clock: Clock
    stages: Mapping[str, Stage]

    def decode(self, stored: Tensor, carried: Tensor) -> None:
        self.clock.spend(self.stages["decode"])

    def unpack(self, carried: Tensor, bound: Tensor) -> None:
        self.clock.spend(self.stages["unpack"])

    def load(self, stored: Tensor, bound: Tensor) -> None:
        self.clock.spend(self.stages["unpack"])


class PacedSlabs:
    """Slabs on a disk that reads one after the other."""

    def __init__(self, clock: Clock, durations: Durations) -> None:
        self._clock, self._durations, self._queue = clock, durations, PacedQueue(clock)

    def read(self, j: int, into: Tensor) -> Any:
        (stage,) = self._durations.slab(j)
        return self._queue.submit(lambda: self._clock.spend(stage))

    def close(self) -> None:
        pass


class NoBinding:
    def bind(self, memory: Tensor) -> None:
        pass


@dataclass
class PacedRecording:
    k: int
    load: RowLoad
    hidden: Tensor | None
    hidden_moves: bool = True
    arriving: dict[int, Promise] = field(default_factory=dict)

    @property
    def tokens(self) -> Tensor:
        assert self.hidden is not None
        return self.hidden


class PacedRows:
    """Rows whose layer calls take time."""

    can_be_halved = False

    def __init__(self, meter: PacedMeter, clock: Clock, durations: Durations, head_slice: int) -> None:
        self._meter, self._clock, self._durations, self._head_slice = meter, clock, durations, head_slice
        self.num_layers = durations.plan.shapes.num_layers
        self._cache, self._cpu = PacedQueue(clock), PacedQueue(clock)
        self._suspend: Callable[[], None] = lambda: None
        self.load = SweepLoad((), 0, 0, 0)
        self._rows: list[Row] = []
        self._layer = -1

    def reserve(self, sweep: Sweep) -> None:
        self._rows, self._layer = sweep.rows, -1

    def record(self, row: Row) -> PacedRecording:
        k = next(k for k, other in enumerate(self._rows) if other is row)
        load = self.load.rows[k]
        self._spend(self._durations.record(load))
        shapes = self._durations.plan.shapes
        hidden = torch.zeros(row.size, shapes.hidden_size * shapes.itemsize, dtype=torch.uint8)
        return PacedRecording(k, load, hidden)

    def load_cache(self, j: int, recording: PacedRecording) -> Promise | None:
        if not recording.load.stages:
            return None
        pieces = self._durations.load_cache(recording.load)
        recording.arriving[j] = self._cache.submit(self._timed("host_to_device", "load_cache", j, lambda: self._bring(pieces)))
        return recording.arriving[j]

    def store_cache(self, j: int, recording: PacedRecording) -> Promise | None:
        if not recording.load.taken:
            return None
        pieces = self._durations.store_cache(recording.load)
        return self._cache.submit(lambda: self._take_away(pieces))

    def _bring(self, pieces: list[list[Stage]]) -> None:
        """As `WorkingSet._bring`: reads go on in a few buffers while earlier ones are copied."""
        reads: deque[tuple[list[Stage], Promise]] = deque()
        disk = PacedQueue(self._clock)
        for piece in pieces:
            if len(reads) == NUM_BUFFERS:
                self._arrive(*reads.popleft())
            first = piece[:-1]
            reads.append((piece[-1:], disk.submit(lambda first=first: self._spend(first))))  # type: ignore[misc]
        for stages, promise in reads:
            self._arrive(stages, promise)

    def _arrive(self, stages: list[Stage], promise: Promise) -> None:
        promise.wait()
        self._spend(stages)

    def _take_away(self, pieces: list[list[Stage]]) -> None:
        disk = PacedQueue(self._clock)
        writes: deque[Promise] = deque()
        for piece in pieces:
            if len(writes) == NUM_BUFFERS:
                writes.popleft().wait()
            self._spend(piece[:1])
            rest = piece[1:]
            writes.append(disk.submit(lambda rest=rest: self._spend(rest)))  # type: ignore[misc]
        for write in writes:
            write.wait()

    def replay(self, j: int, recording: PacedRecording) -> None:
        if recording.load.stages:
            with self._meter.waiting():
                recording.arriving.pop(j).wait()
        stages = self._durations.layer(j, recording.load, first=self._layer != j)
        self._layer = j
        self._spend(stages[:1])
        if recording.load.on_host:
            attended = self._cpu.submit(self._timed("cpu_attention", "compute", j, lambda: self._spend(stages[1:2])))
            if not attended.done():
                self._suspend()
            with self._meter.waiting():
                attended.wait()
            self._spend(stages[2:])

    def use_suspender(self, suspend: Callable[[], None]) -> None:
        self._suspend = suspend

    def bad_tokens(self, recording: PacedRecording) -> None:
        pass

    def finish(self, hidden: Tensor) -> Tensor:
        self._spend(self._durations.finish(self._head_slice))
        return hidden.float()

    def close(self) -> None:
        pass

    def _spend(self, stages: list[Stage]) -> None:
        for stage in stages:
            self._clock.spend(stage)

    def _timed(self, resource: Resource, kind: ActivityKind, j: int, work: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            with self._meter.span(resource, Activity(kind, str(j))):
                work()

        return timed


def measured(durations: Durations, loads: list[SweepLoad], order: Order, folder: Path) -> list[SweepStats]:
    """Return what is measured of each sweep, on the virtual clock of the real executor."""
    plan, clock = durations.plan, Clock(durations.profile.duplex)
    policy, meter = plan.policy, PacedMeter(clock, durations)
    device: Any = Device(torch.device("cpu"), own_memory=plan.space.own_memory)
    rows = PacedRows(meter, clock, durations, policy.gpu_batch_size)
    stats = RunStats()

    def queue(*args: Any) -> PacedQueue:
        return PacedQueue(clock)

    with patch.object(weight_store, "Link", queue), patch.object(hidden_store, "Link", queue):
        hidden: Any = None
        if policy.hidden != ON_DEVICE:
            hidden = HiddenStore(policy.hidden, device=device, folder=folder, meter=meter)
        weights = _weights(clock, durations, device, meter)
        kind = OverlappedExecutor if policy.overlap else SerialExecutor
        executor = kind(rows, head_slice=policy.gpu_batch_size, order=order, weights=weights, hidden=hidden, meter=meter)
        meter.begin_run()
        for load in loads:
            rows.load = load
            executor.run(_sweep(load), lambda requests, logits: None)
            meter.end_sweep(0, 0, 0)
        executor.close()
    meter.end_run(stats)
    return stats.per_sweep


def _sweep(load: SweepLoad) -> Sweep:
    """Return rows of a load; the first ones request its logits."""
    rows, left = [], load.logits
    for each in load.rows:
        count = min(left, each.size)
        left -= count
        requests = [LogitRequest(offset, (), ()) for offset in range(count)]
        rows.append(Row(each.kind, each.size, [Segment((0,) * each.size, 0, logit_requests=requests)]))
    assert not left
    return Sweep(rows)


def _weights(clock: Clock, durations: Durations, device: Device, meter: Any) -> WeightStore | None:
    plan, shapes = durations.plan, durations.plan.shapes
    if not plan.weights.streamed:
        return None
    units: dict[int, Unit] = {}
    for j in plan.weights.streamed:
        tier, stages = plan.weights.tiers[j], durations.weights(j)
        by_name = {"decode": stages[0], "unpack": stages[-1]} if stages else {}
        stored = Layout(shapes.disk_bytes[j] if tier == "disk" else shapes.stored_bytes[j])
        coded = shapes.is_coded and (tier == "disk" or shapes.is_packed)
        form: Any = PacedFormat(
            stored, Layout(shapes.carried_bytes[j]), Layout(shapes.bound_bytes[j]), coded, shapes.is_packed, clock, by_name
        )
        size = max(stored.num_bytes, shapes.carried_bytes[j])
        memory = None if tier == "disk" else torch.zeros(size, dtype=torch.uint8)
        binding: Any = NoBinding()
        units[j] = Unit(binding, form, memory, on_device=tier == "device" and device.own_memory)
    source: Any = PacedSlabs(clock, durations)
    return WeightStore(units, device=device, num_slots=plan.weights.num_slots, source=source, meter=meter)
