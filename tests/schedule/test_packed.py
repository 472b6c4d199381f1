"""The scheduler of packed rows: every slot of every page holds the prefix that attention will take it for."""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from flexgen_helm.kv_cache.pages import PAGE_TOKENS, PagePool, num_pages
from flexgen_helm.schedule.packed import PackedScheduler
from flexgen_helm.schedule.rows import Continuation, Segment, Sweep
from flexgen_helm.schedule.work import PromptWork
from flexgen_helm.types import ResolvedPolicy, Shares
from tests.schedule.symbolic import POLICIES, SPECS, Machine, Prefix, Spec, assert_answers


class PagedMachine(Machine):
    """Slots hold the prefix that their token closes."""

    def __init__(self, policy: ResolvedPolicy, specs: list[Spec]) -> None:
        super().__init__(policy, specs)
        self.slots: dict[tuple[int, int], Prefix] = {}
        self.most_at_once = max([policy.block_size, *(len(spec.limits) for spec in specs)])
        """Completions that may decode side by side: a prompt's own are never taken apart."""

    def run(self, sweep: Sweep) -> None:
        for key in [key for key in self.slots if key[0] < 0]:
            del self.slots[key]  # what is not kept is gone with the layer
        assert sweep.num_decode_tokens <= self.most_at_once
        for row in sweep.rows:
            assert 0 < row.num_tokens <= row.size
            assert row.size == (self.policy.gpu_batch_tokens if row.kind == "prefill" else self.policy.gpu_batch_size)
        super().run(sweep)

    def compute(self, segment: Segment) -> None:
        if segment.copy is not None:
            source, target, count = segment.copy
            for i in range(count):
                self.slots[target, i] = self.slots[source, i]
        for i, token in enumerate(segment.tokens):
            position = segment.start + i
            before = [self.slots[self._slot(segment, p)] for p in range(position)]
            prefix = (*(before[-1] if before else ()), token)
            assert [held == prefix[: p + 1] for p, held in enumerate(before)] == [True] * position
            self.slots[self._slot(segment, position)] = prefix
            self.answer(segment, i, prefix)

    @staticmethod
    def _slot(segment: Segment, position: int) -> tuple[int, int]:
        return segment.table[position // PAGE_TOKENS], position % PAGE_TOKENS


def pages_alone(work: PromptWork) -> int:
    length = len(work.tokens)
    return num_pages(0, length) + sum(
        num_pages(length, length + continuation.max_new_tokens - 1) for continuation in work.continuations
    )


@settings(derandomize=True, max_examples=200, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(SPECS, POLICIES, st.integers(0, 40), st.booleans(), st.integers(1, 10), st.sampled_from([0.0, 3.0]))
def test_every_answer_comes_from_the_right_prefix(
    specs: list[Spec], policy: ResolvedPolicy, spare: int, keep_all: bool, first: int, prompt_row_cost: float
) -> None:
    machine = PagedMachine(policy, specs)
    pool = PagePool(max(pages_alone(work) for work in machine.works) + spare)
    tokens = policy.block_tokens or 1
    scheduler = PackedScheduler(
        policy, block_tokens=tokens, pools={"exact": pool}, keep_all=keep_all, prompt_row_cost=prompt_row_cost
    )
    assert_answers(scheduler, machine, specs, first=first)
    assert pool.num_used == 0


def test_work_that_others_have_computed_before_its_turn_is_not_lost() -> None:
    """A prompt that ends inside a scored one, which runs first because no slot is free."""
    test = test_every_answer_comes_from_the_right_prefix.hypothesis.inner_test  # type: ignore[attr-defined]
    specs = [
        Spec((7,) * 33 + (2, 1, 2), False, ((8, 19), (9, 5), (28, 32))),
        Spec((1, 2, 2), True, ()),
        Spec((1,), False, ((7, 11), (2, 15), (21, 10), (5, 1))),
    ]
    test(specs, ResolvedPolicy(gpu_batch_size=2, num_gpu_batches=1, gpu_batch_tokens=47, block_tokens=194), 14, False, 1, 0.0)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(SPECS)
def test_a_large_block_computes_each_prefix_once(specs: list[Spec]) -> None:
    policy = ResolvedPolicy(gpu_batch_size=64, num_gpu_batches=4, gpu_batch_tokens=16, block_tokens=10_000)
    machine = PagedMachine(policy, specs)
    scheduler = PackedScheduler(policy, block_tokens=10_000, pools={"exact": PagePool(10_000)})
    scheduler.add(machine.works)
    while scheduler.has_work():
        machine.run(scheduler.next_sweep())
        scheduler.end_sweep()
    needed = [spec for spec in specs if spec.score or spec.limits]
    assert machine.computed_tokens >= len({spec.tokens[: i + 1] for spec in needed for i in range(len(spec.tokens) - 1)})
    assert machine.computed_tokens <= len({spec.tokens[: i + 1] for spec in specs for i in range(len(spec.tokens))})


def prompt_tokens_by_sweep(new_tokens: int, prompt_row_cost: float) -> list[int]:
    """Eight prompts of 32 tokens, two to a row, where memory holds five."""
    policy = ResolvedPolicy(gpu_batch_size=16, num_gpu_batches=1, gpu_batch_tokens=64, block_tokens=64)
    specs = [Spec((i + 2,) * 32, False, ((new_tokens, new_tokens),)) for i in range(8)]
    machine = PagedMachine(policy, specs)
    pool = PagePool(5 * pages_alone(machine.works[0]))
    scheduler = PackedScheduler(policy, block_tokens=64, pools={"exact": pool}, prompt_row_cost=prompt_row_cost)
    scheduler.add(machine.works)
    found = []
    while scheduler.has_work():
        sweep = scheduler.next_sweep()
        found.append(sum(row.num_tokens for row in sweep.rows if row.kind == "prefill"))
        machine.run(sweep)
        scheduler.end_sweep()
    return found


def test_a_prompt_waits_for_a_full_row_while_that_is_cheaper() -> None:
    eager, patient = prompt_tokens_by_sweep(8, 0.0), prompt_tokens_by_sweep(8, 3.0)
    assert eager[:4] == [64, 64, 32, 0]
    assert patient[:9] == [64, 64, 0, 0, 0, 0, 0, 0, 64]
    assert [tokens for tokens in patient if tokens] == [64] * 4
    assert sum(tokens > 0 for tokens in eager) == 5


def test_a_prompt_does_not_wait_for_a_full_row_for_ever() -> None:
    """One of five slots is idle, and half a row of padding costs one and a half sweeps: eight fifths are more."""
    assert prompt_tokens_by_sweep(100, 3.0)[:10] == [64, 64, *[0] * 7, 32]


@pytest.mark.parametrize(
    ("cache", "cpu_attention", "first"),
    [((0, 1, 0), 1.0, "decode"), ((1, 0, 0), 1.0, "prefill"), ((0, 1, 0), 0.0, "prefill")],
)
def test_decode_rows_come_first_where_the_cpu_attends(cache: Shares, cpu_attention: float, first: str) -> None:
    """Prompts then fill the time in which the device waits; elsewhere pages arrive while prompts are computed."""
    policy = ResolvedPolicy(gpu_batch_size=2, gpu_batch_tokens=8, cache=cache, cpu_attention=cpu_attention)
    machine = PagedMachine(policy, [Spec((i + 2,) * 6, False, ((3, 3),)) for i in range(4)])
    scheduler = PackedScheduler(policy, block_tokens=8, pools={"exact": PagePool(100)})
    scheduler.add(machine.works)
    for _ in range(2):
        sweep = scheduler.next_sweep()
        machine.run(sweep)
        scheduler.end_sweep()
    assert {row.kind for row in sweep.rows} == {"prefill", "decode"}
    assert sweep.rows[0].kind == first


def test_abandoned_work_leaves_no_page_behind() -> None:
    policy = ResolvedPolicy(gpu_batch_size=2, num_gpu_batches=1, gpu_batch_tokens=8, block_tokens=8)
    pool = PagePool(100)
    scheduler = PackedScheduler(policy, block_tokens=8, pools={"exact": pool})
    works = [PromptWork((*range(40), i), i % 2 == 0, [Continuation(20)]) for i in range(4)]
    machine = PagedMachine(policy, [])
    machine.ends = {continuation: (work.tokens, 20) for work in works for continuation in work.continuations}
    scheduler.add(works)
    for _ in range(7):
        machine.run(scheduler.next_sweep())
        scheduler.end_sweep()
    assert pool.num_used > 0
    assert set(scheduler.abandon()) == set(works)
    assert pool.num_used == 0
    assert not scheduler.has_work()
