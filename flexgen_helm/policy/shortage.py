"""Shortage: explains a plan that needs more memory than may be used, in terms of the user's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexgen_helm.memory.amounts import gib
from flexgen_helm.policy.space import Space, pool_name
from flexgen_helm.types import ON_DEVICE, Policy, ResolvedPolicy, Tier


@dataclass(frozen=True)
class Shortage:
    """A memory plan that does not fit."""

    peak_bytes: Mapping[Tier, int]
    """Most bytes of each tier that the plan needs at any time."""
    least_bytes: Mapping[Tier, int]
    """Bytes of device and host in the placement that needs least."""
    working_bytes: int
    """Bytes of working memory on the device."""
    checking_bytes: int
    """Bytes that the self-check takes in addition to the layers that it checks."""
    weights: str
    """Placement of the weights, in words."""
    space: Space
    """Bytes of each tier that may be used."""


def describe_shortage(plan: Shortage, policy: ResolvedPolicy, asked: Policy) -> str:
    """Return a message: the memory that a plan lacks, the least in which the model runs, and what to change.

    Args:
        plan: The plan that does not fit.
        policy: Policy of the plan.
        asked: Policy that the user gave.
    """
    least, space = plan.least_bytes, plan.space
    if any(count > space.of(tier) for tier, count in least.items()):
        sizes = f"gpu_batch_tokens={policy.gpu_batch_tokens} and gpu_batch_size={policy.gpu_batch_size}"
        return (
            f"The least that this model runs in is {_amounts(least, space)}, but {_allowed(least, space)}. Of it, computing "
            f"with {sizes} takes about {gib(plan.working_bytes)}, and the self-check at load about {gib(plan.checking_bytes)} "
            f"in addition to the layers that it checks. {_remedy(least, space)}, or lower gpu_batch_tokens or "
            "gpu_batch_size."
        )
    short = {tier: count for tier, count in plan.peak_bytes.items() if count > space.of(tier)}
    defaults = {"weights": None, "cache": ON_DEVICE, "prefetch": Policy.prefetch}
    named = {name: value for name, default in defaults.items() if (value := getattr(asked, name)) not in (None, default)}
    what = ", ".join(f"{name}={value}" for name, value in named.items()) or "The model"
    needs = f"{what} needs {_amounts(short, space)}, but {_allowed(short, space)}. Weights: {plan.weights}"
    if set(short) == {"disk"}:
        return f"{needs}. Free disk space, choose another offload_folder, or lower the shares on disk."
    return (
        f"{needs}. The least that this model runs in is {_amounts(least, space)}. {_remedy(short, space)}, or leave "
        f"{' and '.join(named)} out of the policy."
    )


def _remedy(counts: Mapping[Tier, int], space: Space) -> str:
    limited = any(space.limited(tier) for tier, count in counts.items() if count > space.of(tier))
    return "Allow more memory" if limited else "Free more memory"


def _amounts(counts: Mapping[Tier, int], space: Space) -> str:
    return " and ".join(f"{gib(count, up=True)} of {pool_name(t, own_memory=space.own_memory)}" for t, count in counts.items())


def _allowed(counts: Mapping[Tier, int], space: Space) -> str:
    """Return the bytes that may be used, in words, and whether the user or the machine limits them."""
    parts = []
    for tier in counts:
        amount = gib(space.of(tier)) + (f" of {pool_name(tier, own_memory=space.own_memory)}" if len(counts) > 1 else "")
        where = f" in {space.folder}" if tier == "disk" and space.folder else ""
        parts.append(f"max_memory allows {amount}" if space.limited(tier) else f"{amount} are free{where}")
    return " and ".join(parts)
