"""Enumeration: the integers that the search tries, within a stated bound. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from flexgen_helm.policy.planner.search.candidate import Candidate
from flexgen_helm.policy.planner.search.cost_model import CostModel
from flexgen_helm.policy.planner.search.memory_rows import mixed
from flexgen_helm.policy.space import Space
from flexgen_helm.policy.working_memory import MOST_BLOCK_TOKENS, block_bytes
from flexgen_helm.types import ON_DEVICE, ON_HOST, TIERS, Policy, ResolvedPolicy, Shares, Tier

LIVE_PARTS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)
"""Numbers of live sequences that are tried, as parts of how many there are, or of how many fit on the tiers of the cache."""
BLOCK_SHARE = 0.5
"""Most of the device's memory that the hidden states of a block may take."""
MOST_ROWS = 64
"""Most rows of prompts in a block."""
ROW_SIZES = ((16, 512), (32, 1024), (64, 2048), (128, 4096), (256, 4096))
"""(gpu_batch_size, gpu_batch_tokens) that are tried where numerics may change."""


@dataclass(frozen=True)
class Bounds:
    """What may be chosen.

    Attributes:
        asked: Policy of the user; what differs from the default is kept.
        tiers: Tiers that may be used.
        numerics: Whether row sizes and the place of attention may be chosen too.
    """

    asked: Policy
    tiers: frozenset[Tier]
    numerics: bool


def candidates(model: CostModel, base: ResolvedPolicy, bounds: Bounds) -> Iterator[Candidate]:
    """Yield the candidates.

    Args:
        model: Cost model of the workload.
        base: The default policy: what is not searched stays as it is.
        bounds: What may be chosen.
    """
    space = model.placements.space
    hidden = next(reversed(_supports(space, bounds)), ON_DEVICE)  # the largest set; one RAM has no "host" of its own
    for sized in _row_sizes(base, space, bounds):
        for weights, cache in itertools.product(_weight_tiers(space, bounds), _cache_tiers(sized, space, bounds)):
            for live in _live(model, sized, bounds, cache):
                asked = bounds.asked.num_gpu_batches
                count = asked if asked != Policy.num_gpu_batches else max(1, -(-live // sized.gpu_batch_size))
                policy = replace(sized, num_gpu_batches=count)
                for tokens in _block_tokens(model, policy, live, bounds):
                    yield Candidate(replace(policy, block_tokens=tokens), live, weights, cache, hidden)


def _row_sizes(base: ResolvedPolicy, space: Space, bounds: Bounds) -> list[ResolvedPolicy]:
    if not bounds.numerics:
        return [base]
    asked = bounds.asked
    sizes = [(asked.gpu_batch_size or size, asked.gpu_batch_tokens or tokens) for size, tokens in ROW_SIZES]
    places = [asked.cpu_attention] if asked.cpu_attention is not None or not space.own_memory else [0.0, 1.0]
    found = []
    for (size, tokens), place in itertools.product(dict.fromkeys(sizes), places):
        cpu = base.cpu_attention if place is None else place
        found.append(replace(base, gpu_batch_size=size, gpu_batch_tokens=tokens, cpu_attention=cpu))
    return found


def _supports(space: Space, bounds: Bounds) -> list[Shares]:
    """Return the sets of tiers among which something may be divided, each allowed one of which is named."""
    sets: list[tuple[Tier, ...]] = [("device",), ("device", "host"), ("device", "host", "disk")]
    if not space.own_memory:
        sets = [("device",), ("device", "disk")]
    found = dict.fromkeys(tuple(float(tier in chosen and tier in bounds.tiers) for tier in TIERS) for chosen in sets)
    return [(device, host, disk) for device, host, disk in found if device + host + disk]


def _weight_tiers(space: Space, bounds: Bounds) -> list[Shares]:
    if space.own_memory:
        return _supports(space, bounds)
    # One RAM: a part of it is named "host", as the default does.
    return [ON_DEVICE, *([(0.0, 1.0, 1.0)] if "disk" in bounds.tiers else [])]


def _cache_tiers(policy: ResolvedPolicy, space: Space, bounds: Bounds) -> list[Shares]:
    if bounds.asked.cache is not None:
        device, host, disk = (float(share > 0) for share in bounds.asked.cache)
        return [(device, host, disk)]
    if space.own_memory and space.is_gpu and policy.cpu_attention:
        return [ON_HOST]  # an answer must not depend on where its K and V are (flexgen_helm.policy.attention_place)
    return _supports(space, bounds)


def _live(model: CostModel, policy: ResolvedPolicy, bounds: Bounds, cache: Shares) -> list[int]:
    """Return numbers of live sequences, from as many as there are and as fit down to one row or less."""
    features = model.features
    if not features.sequences:
        return [policy.block_size]
    most = features.sequences
    if bounds.asked.num_gpu_batches != Policy.num_gpu_batches:
        most = min(most, bounds.asked.num_gpu_batches * policy.gpu_batch_size)
    plan = model.placements.plan(Candidate(policy, 1, ON_DEVICE, cache), ON_DEVICE, mixed(cache))
    room = sum(model.placements.space.of(tier) for tier, used in zip(TIERS, cache, strict=True) if used)
    each = plan.cache.sequence_bytes(max(1, round(features.sequence_tokens)))
    most = max(1, min(most, int(room / max(1, each))))
    parts = [max(1, int(most * part)) for part in LIVE_PARTS]
    rounds = [max(1, -(-features.sequences // (-(-features.sequences // each)))) for each in parts]
    whole = [each // policy.gpu_batch_size * policy.gpu_batch_size for each in parts if each > policy.gpu_batch_size]
    return list(dict.fromkeys([*rounds, *parts, *whole]))


def _block_tokens(model: CostModel, policy: ResolvedPolicy, live: int, bounds: Bounds) -> Sequence[int]:
    """Return prompt tokens of a sweep: the least that keep all sequences live, all prompts at once, and the default."""
    if bounds.asked.block_tokens is not None:
        return [bounds.asked.block_tokens]
    row, features = policy.gpu_batch_tokens, model.features
    fitting = int(BLOCK_SHARE * model.placements.space.of("device")) // block_bytes(model.shapes, 1)
    most = min(MOST_ROWS * row, max(row, fitting), max(row, features.prompt_tokens))
    wanted = [most, min(most, MOST_BLOCK_TOKENS), min(most, policy.num_gpu_batches * row), row]
    if features.sequences:
        sweeps_each = features.steps / features.sequences + 1
        wanted.append(int(live * features.kept_tokens / features.sequences / sweeps_each))
    return list(dict.fromkeys(max(row, -(-tokens // row) * row) for tokens in wanted))
