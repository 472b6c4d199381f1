"""Row sizes: chosen by device and policy only, never by the jobs that wait, because they are numerics."""

from __future__ import annotations

import dataclasses

import torch

from flexgen_helm.memory.device import Device
from flexgen_helm.policy.default_rows import default_rows
from flexgen_helm.types import Policy, ResolvedPolicy


def with_row_sizes(policy: Policy | None, device: Device, *, few_requests: bool = False) -> Policy:
    """Decide the row sizes that a policy leaves open. Its other fields do not change them, and stay as they are.

    Args:
        policy: Policy of the user; None if there is none.
        device: The device that computes.
        few_requests: Whether requests come a few at a time, as in HELM's client.
    """
    policy = Policy() if policy is None else policy
    size, tokens = default_rows(is_gpu=device.is_gpu, threads=torch.get_num_threads(), few_requests=few_requests)
    return dataclasses.replace(
        policy,
        gpu_batch_size=policy.gpu_batch_size or size,
        gpu_batch_tokens=policy.gpu_batch_tokens or tokens,
    )


def resolved(policy: Policy | None, device: Device, *, few_requests: bool = False) -> ResolvedPolicy:
    """Decide the row sizes as `with_row_sizes` does, and give other fields that are open their defaults."""
    sized = with_row_sizes(policy, device, few_requests=few_requests)
    named = {field.name: getattr(sized, field.name) for field in dataclasses.fields(sized)}
    return ResolvedPolicy(**{name: value for name, value in named.items() if value is not None})
