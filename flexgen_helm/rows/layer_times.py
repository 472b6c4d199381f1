"""Measure how long layers of a real model take for whole packed rows, on the way on which an engine computes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import torch

from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS, PageCounts, PageStorage
from flexgen_helm.machine.profile import LayerTime, ProcessorSeconds
from flexgen_helm.machine.rates import much_memory
from flexgen_helm.machine.rounds import ROUNDS, median_of, time_of
from flexgen_helm.memory.allocator import LARGE_TENSOR_MAPS
from flexgen_helm.memory.device import Device
from flexgen_helm.model.linear import PackedLinear
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.rows.packed import PackedRecording, PackedRows
from flexgen_helm.schedule.rows import Row, Segment, Sweep, pack_decode, pack_prefill
from flexgen_helm.types import ResolvedPolicy

Times = tuple[float, float]
"""Seconds by the clock on the wall, and processor time over the number of threads."""
MOST_SECONDS = 3.0
"""No round begins later than so long behind the first one."""
RECORD_ROUNDS = 3
FAST_ROUNDS = 40
"""Rounds where caches are left alone, which take a millisecond."""


class Form(NamedTuple):
    """How an engine holds what a layer works with.

    Attributes:
        is_packed: Whether weights are in the layout of the library that multiplies.
        is_mapped: Whether large tensors get memory of their own, as where weights are streamed.
    """

    is_packed: bool
    is_mapped: bool


FORMS = Form(False, False), Form(False, True), Form(True, False)
"""As they are; with weights that are streamed; with weights that stay."""


@dataclass(frozen=True)
class MeasuredModel:
    """The first layers of a model.

    Attributes:
        model: The layers, with any weights.
        signature: Names the sizes of the whole model.
        kinds: For each layer of the whole model, the number of the first layer of its kind, which is among those here.
    """

    model: RecordedModel
    signature: str
    kinds: Sequence[int]


def layer_times(
    measured: MeasuredModel, policy: ResolvedPolicy, device: Device, *, cold: bool = True, forms: Sequence[Form] = FORMS
) -> Iterator[LayerTime]:
    """Measure a prefill row and a decode row, in each form that the device has.

    Large tensors are not mapped on a GPU. Weights are packed where the library does that and they are in the RAM of a CPU; the
    model's are packed afterwards.

    Args:
        measured: The model.
        policy: Row sizes.
        device: The device.
        cold: Whether weights come from memory; otherwise they stay in caches if they fit.
        forms: Those that are wanted; packed ones come last.

    Raises:
        UnsupportedModel: If the model does not run in packed rows.
    """
    model = measured.model
    for form in forms:
        if (form.is_mapped and device.is_gpu) or (form.is_packed and device.own_memory):
            continue
        if form.is_packed:
            model.pack_weights((policy.gpu_batch_size, policy.gpu_batch_tokens))
            if not any(isinstance(module, PackedLinear) for layer in model.layers for module in layer.modules()):
                return
        rows = PackedRows(model, PagedCache(device=device))
        try:
            for row in (_prefill_row(policy), _decode_row(policy)):
                with LARGE_TENSOR_MAPS.hold() if form.is_mapped else nullcontext():
                    found = _time_row(measured, rows, row, device, cold=cold)
                yield _layer_time(measured, row, form, found, is_gpu=device.is_gpu)
        finally:
            rows.close()


def _layer_time(measured: MeasuredModel, row: Row, form: Form, found: _RowTimes, *, is_gpu: bool) -> LayerTime:
    first = median_of([wall for wall, _ in found.first])
    seconds = [[median(each) for each in zip(*part, strict=True)] for part in (found.first, found.next, found.record)]
    return LayerTime(
        measured.signature,
        str(measured.model.model.dtype).removeprefix("torch."),
        row.kind,
        row.size,
        first.value,
        first.spread,
        form.is_packed,
        seconds[1][0],
        seconds[2][0],
        None if is_gpu else ProcessorSeconds(*(by_processor for _, by_processor in seconds)),
        measured.model.compiled is not None,
        form.is_mapped,
    )


@dataclass
class _RowTimes:
    """Seconds of a row in each round, by the clock on the wall and by processor time.

    Attributes:
        record: Of recording it, and of what its first layer does once for all layers.
        first: Of a layer whose weights come from memory.
        next: Of the same right behind.
    """

    record: list[Times] = field(default_factory=list)
    first: list[Times] = field(default_factory=list)
    next: list[Times] = field(default_factory=list)


def _time_row(measured: MeasuredModel, rows: PackedRows, row: Row, device: Device, *, cold: bool) -> _RowTimes:
    kinds, here = measured.kinds, measured.kinds[: rows.num_layers]
    shares = [kinds.count(kind) / len(kinds) / here.count(kind) for kind in here]
    num_pages = 1 + max(page for segment in row.segments for page in segment.table)
    others = much_memory(device.torch_device) if cold else None
    found = _RowTimes()
    with torch.inference_mode():
        rows.reserve(Sweep([row], {"exact": PageStorage(PageCounts(num_pages))}))
        rows.record(row)
        found.record = [_time_record(rows, row, device) for _ in range(RECORD_ROUNDS)]
        recording = rows.record(row)
        hidden, stop = recording.hidden, time.perf_counter() + MOST_SECONDS
        most = ROUNDS if cold else FAST_ROUNDS
        while len(found.first) <= most and (not found.first or time.perf_counter() < stop):
            first, following = list[Times](), list[Times]()
            recording.hidden = hidden
            for j in range(rows.num_layers):
                if others is not None:
                    others.sum()
                first.append(_time_layer(rows, j, recording, device))
                following.append(_time_layer(rows, j, recording, device))
            found.first.append(_mean(first, shares))
            found.next.append(_mean(following, shares))
    # The first round plans attention, which recording counts, and allocates.
    return found if len(found.first) == 1 else _RowTimes(found.record, found.first[1:], found.next[1:])


def _time_record(rows: PackedRows, row: Row, device: Device) -> Times:
    """Time the recording of a row, and by how much its first layer takes longer than once more: it plans attention for all."""
    made: list[PackedRecording] = []
    record = _time(lambda: made.append(rows.record(row)), device, 1)
    planning, again = (_time_layer(rows, 0, made[0], device) for _ in range(2))
    wall, processor = (each + max(0.0, first - other) for each, first, other in zip(record, planning, again, strict=True))
    return wall, processor


def _mean(times: list[Times], shares: Sequence[float]) -> Times:
    wall, processor = (sum(s * x for s, x in zip(shares, part, strict=True)) for part in zip(*times, strict=True))
    return wall, processor


def _time_layer(rows: PackedRows, j: int, recording: PackedRecording, device: Device) -> Times:
    def compute() -> None:
        rows.load_cache(j, recording)
        rows.replay(j, recording)
        rows.store_cache(j, recording)

    return _time(compute, device, torch.get_num_threads())


def _time(work: Callable[[], object], device: Device, threads: int) -> Times:
    if device.is_gpu:
        torch.cuda.synchronize(device.torch_device)
    return time_of(work, 1, device.torch_device, threads)


def _prefill_row(policy: ResolvedPolicy) -> Row:
    """Return a full row of sequences that begin in it, each of one chunk."""
    count = -(-policy.gpu_batch_tokens // CHUNK_TOKENS)
    segments = [Segment(_tokens(i, CHUNK_TOKENS), 0, _own_pages(i)) for i in range(count)]
    return pack_prefill(segments, policy)[0]


def _decode_row(policy: ResolvedPolicy) -> Row:
    """Return a full row of sequences whose last token is in the middle of their first chunk."""
    segments = [Segment(_tokens(i, 1), CHUNK_TOKENS // 2, _own_pages(i)) for i in range(policy.gpu_batch_size)]
    return pack_decode(segments, policy)[0]


def _tokens(i: int, count: int) -> tuple[int, ...]:
    return tuple(2 + (i + 7 * token) % 200 for token in range(count))


def _own_pages(i: int) -> list[int]:
    return list(range(i * CHUNK_PAGES, (i + 1) * CHUNK_PAGES))
