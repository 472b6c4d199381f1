"""Sweeps that an engine would do for a workload: its own scheduler plans them, with made-up tokens. No torch.

Completions end after their expected number of new tokens. Where several sweeps in a row only decode the same completions, one
stands for up to `ALIKE` of them: the one in their middle, since their K and V grow by as many tokens in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from flexgen_helm.errors import OutOfSpace
from flexgen_helm.kv_cache.pages import Form, PageCounts, PageMap, PageStorage, grown
from flexgen_helm.policy.capacity import Capacity, packed_scheduler, page_pools
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.loads import SweepLoad, row_loads
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.schedule.rows import Continuation, LogitRequest, Sweep, host_attended
from flexgen_helm.schedule.work import PromptWork
from flexgen_helm.types import TIERS, Tier

ALIKE = 4
"""Most sweeps for which one stands."""


@dataclass(eq=False)
class _MadeUp(Continuation):
    """A completion of made-up tokens."""

    def step(self) -> None:
        self.tokens.append(0)
        self.done = len(self.tokens) >= self.max_new_tokens


def plan_capacity(plan: MemoryPlan) -> Capacity:
    """Return what sweeps may hold under a plan, if nothing else takes memory."""
    return Capacity.of(plan, plan.space.available)


def page_bytes_of(plan: MemoryPlan) -> dict[Form, int]:
    """Return the bytes of a page in all layers, by form."""
    shapes = plan.shapes
    return plan.page_bytes(shapes.cache_bytes_per_token * shapes.itemsize // shapes.kv_itemsize)


def sweep_loads(
    plan: MemoryPlan, workload: Workload, *, alike: int = ALIKE, capacity: Capacity | None = None
) -> Iterator[SweepLoad]:
    """Yield the sweeps of a workload in order.

    Args:
        plan: The memory plan; rows are packed and in column order.
        workload: What is asked.
        alike: Most sweeps for which one stands; 1: every sweep is yielded.
        capacity: What sweeps may hold; None: all that the plan leaves.
    """
    return _Sweeps(plan, alike, capacity or plan_capacity(plan)).run(workload)


class _Sweeps:
    def __init__(self, plan: MemoryPlan, alike: int, capacity: Capacity) -> None:
        policy, own_memory = plan.policy, plan.space.own_memory
        self._pools = page_pools(policy, capacity, page_bytes_of(plan))
        self._scheduler = packed_scheduler(policy, capacity.block_tokens, self._pools, is_gpu=plan.space.is_gpu)
        self._maps = {form: PageMap(pool.capacities, own_memory) for form, pool in self._pools.items()}
        self._staged = any(pool.capacities.is_staged(own_memory) for pool in self._pools.values())
        self._host_share = policy.cpu_attention if own_memory and policy.cache[1] else 0.0
        self._alike = alike
        self._held = _Held(plan, {form: pool.limits for form, pool in self._pools.items()})

    def run(self, workload: Workload) -> Iterator[SweepLoad]:
        scheduler = self._scheduler
        prompts = workload.prompts
        scheduler.add([PromptWork(p.tokens, p.score, [_MadeUp(count) for count in p.new_tokens]) for p in prompts])
        while scheduler.has_work():
            sweep = scheduler.next_sweep()
            count = self._alone(sweep)
            self._skip(sweep, count // 2)
            load = self._load(sweep)
            self._skip(sweep, count - 1 - count // 2)
            _answer(sweep)
            finished = scheduler.end_sweep()
            if sweep.rows:
                yield replace(load, count=count, answers=bool(finished))
            elif not finished:
                raise OutOfSpace(
                    "K and V of one prompt of the workload do not fit into the cache under this policy. Give the engine more "
                    "memory (max_memory), or shorter prompts."
                )

    def _alone(self, sweep: Sweep) -> int:
        """Return how many sweeps like this one follow each other, itself included, since it is all that can be done."""
        rows = sweep.rows
        if any(segment.copy is not None for row in rows for segment in row.segments):
            return 1  # the first step of a completion brings a page more
        if not rows or self._alike == 1 or len(self._pools) > 1 or any(row.kind == "prefill" for row in rows):
            return 1
        if self._scheduler.holds_back:
            return 1
        left = min(c.max_new_tokens - len(c.tokens) for c in _continuations(sweep))
        return min(self._alike, left)

    def _skip(self, sweep: Sweep, count: int) -> None:
        """Let the completions of a sweep take so many steps; its segments move on."""
        if not count:
            return
        for continuation in _continuations(sweep):
            continuation.tokens.extend([0] * count)
        for row in sweep.rows:
            for segment in row.segments:
                segment.start += count

    def _load(self, sweep: Sweep) -> SweepLoad:
        on_host = host_attended(sweep.rows, self._host_share)
        loads = row_loads(sweep, self._maps, on_host, staged=self._staged)
        requests = list(_requests(sweep))
        generated = sum(len(request.continuations) for request in requests)
        held = self._held.with_pages(sweep.pages)
        return SweepLoad(loads, len(requests), sweep.num_prompt_tokens, generated, cache_bytes=held)


class _Held:
    """Bytes of K and V on each tier, which grow as those of `flexgen_helm.kv_cache.form_pages` do."""

    def __init__(self, plan: MemoryPlan, limits: Mapping[Form, PageCounts]) -> None:
        self._sizes, self._limits, self._num_layers = page_bytes_of(plan), limits, plan.shapes.num_layers
        self._grows = not plan.space.is_gpu
        self._pages: dict[tuple[Form, str], int] = {}

    def with_pages(self, pages: Mapping[Form, PageStorage]) -> dict[Tier, int]:
        """Return the bytes once there is room for the pages of a sweep. Transient ones are those of one layer."""
        found: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        for form, storage in pages.items():
            size = self._sizes[form]
            for tier, wanted, limit in zip(TIERS, storage.kept, self._limits[form], strict=True):
                found[tier] += size * self._grown((form, tier), wanted if self._grows else limit, limit)
            found["device"] += size * self._grown((form, "transient"), storage.transient, None) // self._num_layers
        return found

    def _grown(self, key: tuple[Form, str], wanted: int, limit: int | None) -> int:
        self._pages[key] = grown(self._pages.get(key, 0), wanted, limit)
        return self._pages[key]


def _requests(sweep: Sweep) -> Iterator[LogitRequest]:
    return (request for row in sweep.rows for segment in row.segments for request in segment.logit_requests)


def _continuations(sweep: Sweep) -> Iterator[Continuation]:
    return (continuation for request in _requests(sweep) for continuation in request.continuations)


def _answer(sweep: Sweep) -> None:
    """Answer all logit requests of a sweep, as `flexgen_helm.runtime.intake` does."""
    for request in _requests(sweep):
        for scores, i in request.targets:
            scores.logprobs[i] = 0.0
        for continuation in request.continuations:
            assert isinstance(continuation, _MadeUp)
            continuation.step()
