"""Measure how long layers of a real model take for whole packed rows, on the way on which an engine computes them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS, PageCounts, PageStorage
from flexgen_helm.machine.profile import LayerTime
from flexgen_helm.machine.rates import much_memory
from flexgen_helm.machine.rounds import ROUNDS, median_of
from flexgen_helm.memory.device import Device
from flexgen_helm.model.linear import PackedLinear
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.rows.packed import PackedRecording, PackedRows
from flexgen_helm.schedule.rows import Row, Segment, Sweep, pack_decode, pack_prefill
from flexgen_helm.types import ResolvedPolicy

MOST_SECONDS = 3.0
"""No round begins later than so long behind the first one."""
FAST_ROUNDS = 40
"""Rounds where caches are left alone, which take a millisecond."""


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


def layer_times(measured: MeasuredModel, policy: ResolvedPolicy, device: Device, *, cold: bool = True) -> Iterator[LayerTime]:
    """Measure a prefill row and a decode row, with weights as they are and, where the library packs them, packed.

    The model's weights are packed afterwards.

    Args:
        measured: The model.
        policy: Row sizes.
        device: The device.
        cold: Whether weights come from memory; otherwise they stay in caches if they fit.

    Raises:
        UnsupportedModel: If the model does not run in packed rows.
    """
    model = measured.model
    for is_packed in (False, True):
        if is_packed:
            if device.own_memory:
                return
            model.pack_weights((policy.gpu_batch_size, policy.gpu_batch_tokens))
            if not any(isinstance(module, PackedLinear) for layer in model.layers for module in layer.modules()):
                return
        cache = PagedCache(device=device)
        rows = PackedRows(model, cache)
        try:
            for row in (_prefill_row(policy), _decode_row(policy)):
                seconds, record_seconds = _time_row(measured, rows, row, device, cold=cold)
                found = median_of(seconds)
                yield LayerTime(
                    measured.signature,
                    str(model.model.dtype).removeprefix("torch."),
                    row.kind,
                    row.size,
                    found.value,
                    found.spread,
                    is_packed,
                    record_seconds,
                )
        finally:
            rows.close()


def _time_row(measured: MeasuredModel, rows: PackedRows, row: Row, device: Device, *, cold: bool) -> tuple[list[float], float]:
    """Return the seconds of a layer in each round, and those of recording the row."""
    kinds, here = measured.kinds, measured.kinds[: rows.num_layers]
    shares = [kinds.count(kind) / len(kinds) / here.count(kind) for kind in here]
    num_pages = 1 + max(page for segment in row.segments for page in segment.table)
    others = much_memory(device.torch_device) if cold else None
    found: list[float] = []
    with torch.inference_mode():
        rows.reserve(Sweep([row], {"exact": PageStorage(PageCounts(num_pages))}))
        rows.record(row)
        _wait(device)
        begun = time.perf_counter()
        recording = rows.record(row)
        _wait(device)
        record_seconds = time.perf_counter() - begun
        first, stop = recording.hidden, time.perf_counter() + MOST_SECONDS
        most = ROUNDS if cold else FAST_ROUNDS
        while len(found) <= most and (not found or time.perf_counter() < stop):
            recording.hidden = first
            total = 0.0
            for j, share in enumerate(shares):
                if others is not None:
                    others.sum()
                total += share * _time_layer(rows, j, recording, device)
            found.append(total)
    return found[1:] or found, record_seconds  # the first round plans attention, and allocates


def _time_layer(rows: PackedRows, j: int, recording: PackedRecording, device: Device) -> float:
    _wait(device)
    begun = time.perf_counter()
    rows.load_cache(j, recording)
    rows.replay(j, recording)
    rows.store_cache(j, recording)
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: Device) -> None:
    if device.is_gpu:
        torch.cuda.synchronize(device.torch_device)


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
