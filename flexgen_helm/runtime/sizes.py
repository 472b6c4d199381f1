"""Row and block sizes: by model, machine and limits only, never by what waits (row sizes are numerics)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from flexgen_helm.errors import FlexGenError, PolicyError
from flexgen_helm.runtime.working_memory import block_bytes, least_block_tokens
from flexgen_helm.types import TIERS, Policy, Shares

HIDDEN_SHARE = 0.1
"""Share of the memory left that a block's hidden states may take beyond those of the smallest block."""
MOST_BLOCK_TOKENS = 16_384
"""Larger blocks gain nothing where weights stay, and finish their first job later."""
ROUNDING = 1e-6
"""How far shares may be from adding up to 1."""
VECTOR = 16
"""Elementwise kernels give other bits in the scalar tail of each thread's share (AVX-512: 16 floats)."""


def default_policy(device: torch.device) -> Policy:
    """Sizes for throughput: (64 sequences, 512 tokens) on a CPU, (256, 4096) on a GPU."""
    return Policy(256, 4, 4096) if device.type == "cuda" else _rounded(Policy(64, 4, 512))


def resolve_device(name: str) -> torch.device:
    """The device that a name means.

    Raises:
        FlexGenError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FlexGenError(f"device is {name!r}. Give 'auto', 'cpu', 'cuda' or 'cuda:N'.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FlexGenError("device is 'cuda', but torch sees no CUDA GPU on this machine. Use device='cpu'.")
    return device


def small_policy(device: torch.device) -> Policy:
    """Sizes for a few requests at a time, where padding would cost more than large rows gain."""
    return default_policy(device) if device.type == "cuda" else _rounded(Policy(16, 4, 64))


def _rounded(policy: Policy) -> Policy:
    step = VECTOR * torch.get_num_threads()
    sizes = {name: -(-getattr(policy, name) // step) * step for name in ("gpu_batch_size", "gpu_batch_tokens")}
    return dataclasses.replace(policy, **sizes)


def default_block_tokens(policy: Policy, model: PreTrainedModel, num_bytes: int) -> int:
    """Prompt tokens of a block whose hidden states fit well into so much memory."""
    fitting = int(HIDDEN_SHARE * num_bytes) // block_bytes(model, 1)
    return max(least_block_tokens(policy), min(MOST_BLOCK_TOKENS, fitting))


def validated(policy: Policy) -> Policy:
    """Return the policy.

    Raises:
        PolicyError: If a number is out of its range.
    """
    for name in ("gpu_batch_size", "num_gpu_batches", "gpu_batch_tokens", "block_tokens", "prefetch"):
        value = getattr(policy, name)
        if value is None and name == "block_tokens":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PolicyError(f"{name} is {value!r}, but it counts something. Give an integer of at least 1.")
    if not _is_share(policy.cpu_attention):
        raise PolicyError(f"cpu_attention is {policy.cpu_attention!r}, but it is a share. Give a number from 0 to 1.")
    if not isinstance(policy.overlap, bool):
        raise PolicyError(f"overlap is {policy.overlap!r}. Give true or false.")
    return dataclasses.replace(
        policy,
        weights=None if policy.weights is None else _shares("weights", policy.weights),
        cache=_shares("cache", policy.cache),
        hidden=_shares("hidden", policy.hidden),
    )


def _shares(name: str, given: Sequence[float]) -> Shares:
    """Shares as they stand in YAML or in a policy, as a tuple."""
    shares = tuple(given) if isinstance(given, list | tuple) else ()
    if len(shares) != len(TIERS) or not all(map(_is_share, shares)) or abs(sum(shares) - 1) > ROUNDING:
        raise PolicyError(
            f"{name} is {given!r}, but it says which share lies on {', '.join(TIERS)}. Give three numbers from 0 to 1 that add "
            "up to 1, such as [0.2, 0.8, 0]."
        )
    return float(shares[0]), float(shares[1]), float(shares[2])


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
