"""Closed form of time: how long each resource is busy in a sweep, as linear functions of shares (FlexGen section 4.3).

The terms are those of FlexGen's appendix A.3, with these differences, each because the engine differs:

* Prompts ride in sweeps that decode (peers.md section 4), so there are sweeps with prompts and sweeps without, each as long as
  its busiest resource, in place of a time of prefill and one of decoding.
* K and V that are not on the device are brought to it, or the CPU attends to those on the host (`cpu_attention`): FlexGen's
  model assumes the second for all of them.
* Heads are grouped, weights and K and V may be packed, embeddings and the head count: bytes are those of `MemoryPlan`.
* Scoring work keeps no K and V, and what prompts share is computed once (`Features`).
* A layer call and every other operation has a fixed time; FlexGen's model has none, and is 2.4 times off where all is resident.

The time of one operation comes from `Durations`, which the simulator asks too. Here operations are counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from flexgen_helm.kv_cache.pages import CHUNK_TOKENS, PAGE_TOKENS, Form
from flexgen_helm.machine.profile import MachineProfile, RowKind
from flexgen_helm.policy.cache_plan import CachePlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.durations import Durations, Stage
from flexgen_helm.policy.planner.loads import RowLoad
from flexgen_helm.policy.planner.search.candidate import Candidate, SweepKind, Sweeps, candidate_of
from flexgen_helm.policy.planner.search.features import Features
from flexgen_helm.policy.planner.search.linear import Linear, Share
from flexgen_helm.policy.planner.search.memory_rows import Placements, mixed, only
from flexgen_helm.types import ON_DEVICE, TIERS, ResolvedPolicy, Tier

Pool = str
"""What is busy: the device, the cores of the host, or a link; see `Stage`."""
OPERATIONS_PER_SQUARE = 4
"""Operations besides `compute` for a row and a layer: loads and stores of cache and hidden state."""
OPERATIONS_PER_LAYER = 2
"""`load_weights` and `release_weights`."""
ROUNDING = 1e-9
"""Part of a row or position that is none, since averages are sums of floats."""


@dataclass(frozen=True)
class CostModel:
    """Times of the resources for one model, machine and workload."""

    placements: Placements
    profile: MachineProfile
    features: Features

    @property
    def shapes(self) -> ModelShapes:
        """Sizes of the model."""
        return self.placements.shapes

    def sweeps(self, candidate: Candidate) -> Sweeps:
        """Count the sweeps of a run."""
        tokens = candidate.policy.block_tokens
        assert tokens is not None, "a candidate's block_tokens are decided"
        return Sweeps.of(self.features, candidate.live, tokens)

    def busy(self, kind: SweepKind, candidate: Candidate) -> dict[Pool, Linear]:
        """Return how long each resource is busy in a sweep, with or without prompts."""
        sweeps, rows = self.sweeps(candidate), self.rows(kind, candidate)
        plan = self.placements.plan(candidate, ON_DEVICE, mixed(candidate.cache))
        durations, found = Durations(plan, self.profile), _Busy()
        if rows.get("prefill"):
            row = self.prompt_row(durations, sweeps, rows["prefill"])
            found.add(self._layers(durations, row), rows["prefill"])
            found.add(durations.record(row), rows["prefill"])
        if rows["decode"]:
            self._decoding(found, durations, sweeps, rows["decode"])
        self._cache(found, durations, sweeps, kind)
        self._hidden(found, durations, rows)
        for tier, seconds in self._weights.items():  # once a sweep for all rows: zig-zag order, section 4.2
            for pool, value in seconds.items():
                found.add_seconds(pool, value, Share("weights", tier))
        found.add(durations.finish(self.logits(kind, sweeps)))
        count = self.shapes.num_layers * (OPERATIONS_PER_SQUARE * sum(rows.values()) + OPERATIONS_PER_LAYER)
        found.add_seconds("device" if self.profile.is_gpu else "host", count * self.profile.operation_seconds)
        return found.pools

    def alone(self, kind: SweepKind, candidate: Candidate, busy: Mapping[Pool, Linear]) -> list[Linear]:
        """Return the time of a sweep of one row for which the CPU attends: device and CPU wait for each other in each layer."""
        rows = self.rows(kind, candidate)
        one = rows["decode"] == sum(rows.values()) == 1
        if not one or "device" not in busy or not candidate.policy.cpu_attention:
            return []
        return [busy["device"] + busy.get("host", Linear())]

    def joint(self, busy: Mapping[Pool, Linear]) -> list[Linear]:
        """Return the times of both directions of the link to the device together.

        While both are busy, each moves `duplex` of its bytes per second. If the shorter one takes t alone, it takes t / duplex
        beside the other one, of which t are then done too: in all the longer one's time plus t (1 / duplex - 1).
        """
        there, back = (busy.get(way, Linear()) for way in ("host_to_device", "device_to_host"))
        slower = 1 / self.profile.duplex - 1
        return [there + back * slower, back + there * slower] if slower else []

    def kept_tokens(self, live: float) -> float:
        """Return the tokens whose K and V are kept for so many live sequences."""
        return live * self.features.sequence_tokens + self.features.shared_tokens

    def cache_bytes(self, live: float, cache: CachePlan) -> float:
        """Return the bytes of K and V of so many live sequences, in whole pages."""
        beside = live * (cache.sequence_bytes(0))
        return self.kept_tokens(live) * cache.bytes_per_token + beside

    def _decoding(self, found: _Busy, durations: Durations, sweeps: Sweeps, count: int) -> None:
        """Add products of decode rows, and attention where K and V are read (A.3, comp_g with its part for the CPU)."""
        row = self.decode_row(durations, sweeps, count)
        plain = self._layers(durations, replace(row, own_keys=0, earlier_keys=0))
        found.add(plain, count)
        found.add(durations.record(row), count)
        on_device = sum(stage.seconds for stage in self._layers(durations, row)) - sum(stage.seconds for stage in plain)
        elsewhere = durations.plan.policy.cpu_attention if self.profile.own_memory else 0.0
        for tier in TIERS:
            part = 1 - elsewhere if tier == "host" else 1.0
            found.add_seconds(plain[0].pool, count * part * on_device, Share("cache", tier))
        if elsewhere:
            every = self._layers(durations, replace(row, on_host=True))
            attention = [stage for stage in every if stage.resource == "cpu_attention"]
            found.add(attention, count * elsewhere, Share("cache", "host"))

    def prompt_row(self, durations: Durations, sweeps: Sweeps, count: int) -> RowLoad:
        """Return a prefill row of average load (A.3, comp_p: products, and attention within and before a chunk)."""
        tokens = sweeps.tokens / count
        earlier = tokens * self.features.earlier_keys / max(1, self.features.prompt_tokens)
        return RowLoad("prefill", durations.plan.policy.gpu_batch_tokens, int(tokens * CHUNK_TOKENS), int(earlier))

    def decode_row(self, durations: Durations, sweeps: Sweeps, count: int) -> RowLoad:
        """Return a decode row of average load (A.3: s + n / 2 tokens that each sequence reads, here in whole chunks)."""
        features, sequences = self.features, sweeps.live / count
        earlier = max(0.0, features.earlier + sweeps.context - features.context)
        apart = sweeps.live * sweeps.context
        shared = self._read_tokens(sweeps) / apart if apart else 1.0
        own_keys, earlier_keys = (
            CHUNK_TOKENS * math.ceil(tokens / CHUNK_TOKENS - ROUNDING)
            for tokens in (CHUNK_TOKENS * sequences, shared * earlier * sequences)
        )
        return RowLoad("decode", durations.plan.policy.gpu_batch_size, own_keys, earlier_keys)

    def rows(self, kind: SweepKind, candidate: Candidate, sweeps: Sweeps | None = None) -> dict[RowKind, int]:
        """Return the rows of a sweep by kind, prefill rows first.

        Args:
            kind: Kind of sweep.
            candidate: Sizes of the rows.
            sweeps: What is in the sweep; None: what is in one on average.
        """
        sweeps, policy = sweeps or self.sweeps(candidate), candidate.policy
        rows: dict[RowKind, int] = {}
        if kind == "prompt":
            rows["prefill"] = math.ceil(sweeps.tokens / policy.gpu_batch_tokens - ROUNDING)
        rows["decode"] = math.ceil(sweeps.live / policy.gpu_batch_size - ROUNDING)
        return rows

    def logits(self, kind: SweepKind, sweeps: Sweeps) -> int:
        """Return the positions whose logits are needed in a sweep: of each step, of first tokens, and what is scored."""
        features = self.features
        of_prompts = features.new_tokens - features.steps + features.scored_positions
        prompts = sweeps.tokens / max(1, features.prompt_tokens) if kind == "prompt" else 0.0
        return math.ceil(sweeps.live + prompts * of_prompts - ROUNDING)

    def pages(self, kind: SweepKind, sweeps: Sweeps) -> tuple[int, int]:
        """Return the pages that decode rows of a sweep read, and those that get new K and V."""
        new = sweeps.live + (kind == "prompt") * sweeps.tokens * self.features.prompt_share / PAGE_TOKENS
        return math.ceil(self._read_tokens(sweeps) / PAGE_TOKENS + sweeps.live / 2), math.ceil(new)

    def _cache(self, found: _Busy, durations: Durations, sweeps: Sweeps, kind: SweepKind) -> None:
        """Add the transfers of pages: what decode rows read, and what is new (A.3, ctog and gtoc, dtoc and ctod)."""
        sizes, layers = durations.plan.shapes.page_shares, self.shapes.num_layers
        form: Form = "sealed" if "sealed" in sizes else "exact"
        read, new = self.pages(kind, sweeps)
        elsewhere = durations.plan.policy.cpu_attention
        for tier in TIERS[1:]:
            if tier == "host" and not self.profile.own_memory:
                continue
            brought = 1 - elsewhere if tier == "host" else 1.0
            row = RowLoad("decode", 1, 0, 0, brought=((tier, form, read),), taken=((tier, form, new),))
            for pieces, part in ((durations.load_cache(row), brought), (durations.store_cache(row), 1.0)):
                found.add((stage for piece in pieces for stage in piece), layers * part, Share("cache", tier))

    def _hidden(self, found: _Busy, durations: Durations, rows: Mapping[RowKind, int]) -> None:
        """Add the transfers of hidden states, in and out between all layers (A.3, the terms with h)."""
        policy = durations.plan.policy
        sizes: dict[RowKind, int] = {"prefill": policy.gpu_batch_tokens, "decode": policy.gpu_batch_size}
        for tier in TIERS[1:]:
            if (tier == "host" and not self.profile.own_memory) or not self._has(tier):
                continue
            for kind, count in rows.items():
                row = RowLoad("decode", sizes[kind], 0, 0)
                for stores in (False, True):
                    found.add(durations.hidden(row, tier, stores=stores), count * self.shapes.num_layers, Share("hidden", tier))

    def _read_tokens(self, sweeps: Sweeps) -> float:
        """Return the tokens whose K and V a sweep's decode rows read; what several read counts once."""
        return min(sweeps.context * sweeps.live, self.kept_tokens(sweeps.live))

    def _layers(self, durations: Durations, row: RowLoad) -> list[Stage]:
        """Return the stages of a row in all layers; layers of one kind are looked up once."""
        kinds = Counter(self._kinds)
        first = {kind: j for j, kind in reversed([*enumerate(self._kinds)])}
        found: list[Stage] = []
        for kind, count in kinds.items():
            found += [stage._replace(seconds=count * stage.seconds) for stage in durations.layer(first[kind], row)]
        return found

    def _has(self, tier: Tier) -> bool:
        """Return whether the machine has the links to a tier."""
        return tier != "disk" or (self.profile.disk_read is not None and self.profile.disk_write is not None)

    @cached_property
    def replayed(self) -> dict[object, float]:
        """Seconds of the sweeps that were replayed for this workload, by all that they depend on: see `sampling`."""
        return {}

    @cached_property
    def _kinds(self) -> list[tuple[int, float]]:
        return [(self.shapes.bound_bytes[j], self.shapes.products_of(j)) for j in range(self.shapes.num_layers)]

    @cached_property
    def _weights(self) -> dict[Tier, dict[Pool, float]]:
        """Seconds of each resource for all weights on one tier, in a sweep (A.3, the terms with w)."""
        smallest = candidate_of(ResolvedPolicy(gpu_batch_size=1, gpu_batch_tokens=1))
        found: dict[Tier, dict[Pool, float]] = {}
        for tier in (tier for tier in TIERS if self._has(tier)):
            plan = self.placements.plan(smallest, only(tier), ON_DEVICE)
            durations, busy = Durations(plan, self.profile), _Busy()
            for j in plan.weights.streamed:
                busy.add([*durations.slab(j), *durations.weights(j)])
            share = plan.weights.shares[TIERS.index(tier)] or 1.0  # embeddings are not on disk
            found[tier] = {pool: value.constant / share for pool, value in busy.pools.items()}
        return found


class _Busy:
    """Sums by what is busy."""

    def __init__(self) -> None:
        self.pools: dict[Pool, Linear] = {}

    def add(self, stages: Iterable[Stage], times: float = 1.0, share: Share | None = None) -> None:
        for stage in stages:
            self.add_seconds(stage.pool, times * stage.seconds, share)

    def add_seconds(self, pool: Pool, seconds: float, share: Share | None = None) -> None:
        term = Linear(seconds) if share is None else Linear(0.0, {share: seconds})
        self.pools[pool] = self.pools.get(pool, Linear()) + term
