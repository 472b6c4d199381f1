"""Row sizes: by model, machine and limits only, never by what waits (row sizes are numerics)."""

from __future__ import annotations

import dataclasses

import torch

from flexgen_helm.memory.device import Device
from flexgen_helm.types import Policy, ResolvedPolicy

VECTOR = 16
"""Elementwise kernels give other bits in the scalar tail of each thread's share (AVX-512: 16 floats)."""
GPU_ROWS = (256, 4096)
"""(gpu_batch_size, gpu_batch_tokens) on a GPU."""
CPU_ROWS = (64, 512)
"""The same on a CPU, for throughput."""
SMALL_CPU_ROWS = (16, 64)
"""The same on a CPU for a few requests at a time, where padding would cost more than large rows gain."""


def resolved(policy: Policy | None, device: Device, *, few_requests: bool = False) -> ResolvedPolicy:
    """Decide the row sizes that a policy leaves open. What else it names does not change them.

    Args:
        policy: What the user names; None: nothing.
        device: Where the matrices are multiplied.
        few_requests: Whether requests come a few at a time, as in HELM's client.
    """
    policy = Policy() if policy is None else policy
    if isinstance(policy, ResolvedPolicy):
        return policy
    if device.is_gpu:
        size, tokens = GPU_ROWS
    else:
        step = VECTOR * torch.get_num_threads()
        size, tokens = (-(-count // step) * step for count in (SMALL_CPU_ROWS if few_requests else CPU_ROWS))
    named = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    named["gpu_batch_size"] = policy.gpu_batch_size or size
    named["gpu_batch_tokens"] = policy.gpu_batch_tokens or tokens
    return ResolvedPolicy(**named)
