"""Rate of the engine's attention on the CPU, alone and while weights are copied to the device from the same memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from flexgen_helm.attention.calls import ChunkCall, PlacedPages
from flexgen_helm.attention.chunks import LocatedPages, attend_call
from flexgen_helm.kv_cache.page_format import PageFormat
from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS
from flexgen_helm.machine.rates import random_numbers
from flexgen_helm.runs.gpu_check.copies import Streams, best_seconds, buffers
from flexgen_helm.runs.gpu_check.sizes import Sizes

CPU = torch.device("cpu")
DTYPE = torch.bfloat16


def measure_cpu_attention(sizes: Sizes) -> dict[str, Any]:
    """Measure the rate at which decoding sequences read K and V, by all threads, in 10**9 bytes per second."""
    attend, num_bytes = _decode_step(sizes)
    with torch.inference_mode():
        alone = best_seconds(attend, sizes.rounds)
        beside, copied = _beside_copies(attend, sizes)
    return {
        "GB of K and V": num_bytes / 1e9,
        "threads": torch.get_num_threads(),
        "GB/s alone": num_bytes / alone / 1e9,
        "GB/s beside copies": num_bytes / beside / 1e9,
        "GB/s of the copies": copied / 1e9,
    }


def _decode_step(sizes: Sizes) -> tuple[Callable[[], object], int]:
    """Return a function that attends to one layer's pages, in any order in memory, and the bytes of these."""
    num_chunks = sizes.num_sequences * sizes.num_chunks
    q = random_numbers((sizes.num_sequences, sizes.num_heads, sizes.head_dim), CPU, DTYPE)
    store = PageFormat.plain(q, q).allocate(num_chunks * CHUNK_PAGES, CPU)
    for stored in (store.k, store.v):
        stored.copy_(random_numbers(tuple(stored.shape), CPU, DTYPE))
    numbers = torch.randperm(num_chunks * CHUNK_PAGES, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(sizes.num_sequences).repeat_interleave(sizes.num_chunks)
    mask = torch.zeros(num_chunks, 1, 1, CHUNK_TOKENS, dtype=DTYPE)
    placed, every = [PlacedPages("host", numbers, None)], slice(0, num_chunks)
    call = ChunkCall("exact", placed, num_chunks, (0,) * num_chunks, rows, every, True, mask, None, rows)
    located = [LocatedPages(store, numbers, None)]
    scale = sizes.head_dim**-0.5
    return partial(attend_call, call, q, located, scale=scale, softcap=None), len(numbers) * store.format.num_bytes


def _beside_copies(attend: Callable[[], object], sizes: Sizes) -> tuple[float, float]:
    """Return the seconds of a call, and bytes per second that were copied to the device by another thread meanwhile."""
    there, here = buffers(sizes.layer_bytes, sizes.torch_device)
    streams, stop, ends = Streams(sizes.torch_device), threading.Event(), [time.perf_counter()]

    def copy() -> None:
        with torch.inference_mode():
            while not stop.is_set():
                streams.copy(0, [(there, here)])
                streams.wait(0)
                ends.append(time.perf_counter())

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        seconds = best_seconds(attend, sizes.rounds)
    finally:
        stop.set()
        thread.join()
    return seconds, (len(ends) - 1) * sizes.layer_bytes / (ends[-1] - ends[0])
