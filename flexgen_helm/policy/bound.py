"""Bottleneck of a run, in words, with advice that would make it shorter. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from flexgen_helm.run_stats import RunStats


class Bound(NamedTuple):
    """The bottleneck of a run: the work that took most of its time."""

    what: str
    """The work, in words."""
    advice: str
    """A change that would make the run shorter."""


MORE_PROMPTS = "more prompts at a time (num_gpu_batches, block_tokens), so that each reading of the weights serves more of them"
BOUNDS = {
    "weights on disk": Bound(
        "reading weights from the disk", f"more host memory (max_memory), dtype bfloat16 in place of float32, or {MORE_PROMPTS}"
    ),
    "disk_read": Bound(
        "reading K, V or hidden states from the disk", "more host memory (max_memory), or a policy without disk in `cache`"
    ),
    "disk_write": Bound(
        "writing K, V or hidden states to the disk", "more host memory (max_memory), or a policy without disk in `cache`"
    ),
    "weights on host": Bound(
        "bringing weights from the host to the device", f"more of the device's memory (max_memory), or {MORE_PROMPTS}"
    ),
    "host_to_device": Bound(
        "bringing K, V or hidden states from the host to the device", "cpu_attention=1, or fewer prompts at a time"
    ),
    "device_to_host": Bound(
        "bringing K, V or hidden states from the device to the host",
        "fewer prompts at a time, so that more fits",
    ),
    "cpu_attention": Bound("attention on the CPU", "cpu_attention=0, or more of the device's memory (max_memory)"),
    "unpack": Bound(
        "unpacking compressed weights", f"a scheme that is unpacked faster (`w4` for `w4-entropy`), or {MORE_PROMPTS}"
    ),
    "memory": Bound("reading weights from the device's own memory", MORE_PROMPTS),
    "device": Bound("multiplying matrices", "a faster device, or a number format in which it multiplies faster (dtype)"),
    "scheduler": Bound("planning the sweeps", "larger rows (gpu_batch_size, gpu_batch_tokens), which are part of the numerics"),
}
"""Bottlenecks by resource, or by the data that the resource moved or read if that changes the advice."""


def bound_of(stats: RunStats) -> Bound | None:
    """Return the bottleneck in which a run spent most of its time; None if nothing was computed."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for sweep in stats.per_sweep:
        if sweep.bound_by is not None:
            seconds[sweep.bound_by] += sweep.seconds
    if not seconds:
        return None
    resource = max(seconds, key=seconds.__getitem__)
    moved = sum(sweep.bytes_moved.get(resource, 0) for sweep in stats.per_sweep)
    weights = sum(sweep.weight_bytes_moved.get(resource, 0) for sweep in stats.per_sweep)
    of_weights = {"disk_read": "weights on disk", "host_to_device": "weights on host"}
    if resource in of_weights and 2 * weights >= moved:
        return BOUNDS[of_weights[resource]]
    least = stats.least_seconds
    if resource == "device" and least.get("read", 0.0) > least.get("products", 0.0):
        return BOUNDS["memory"]
    return BOUNDS[resource]
