"""The scheduler of single rows: every state holds the prefix of the sequence that it goes on with."""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from flexgen_helm.schedule.rows import Continuation, Segment, State, Sweep
from flexgen_helm.schedule.single import SingleScheduler, StateSize
from flexgen_helm.schedule.work import PromptWork
from flexgen_helm.types import ResolvedPolicy
from tests.schedule.symbolic import POLICIES, SPECS, Machine, Spec, assert_answers


class StateMachine(Machine):
    """States hold the tokens that they were computed from. Like the runtime, all rows begin before any is computed."""

    def __init__(self, policy: ResolvedPolicy, specs: list[Spec], size: StateSize, block_tokens: int) -> None:
        super().__init__(policy, specs)
        self.size, self.block_tokens = size, block_tokens
        self.most_bytes = 0

    def run(self, sweep: Sweep) -> None:
        for row in sweep.rows:
            assert row.size == (row.num_tokens if row.kind == "prefill" else self.policy.gpu_batch_size)
            assert len(row.segments) == 1 or row.kind == "decode"
            for segment in row.segments:
                self.begin(segment.state)
        prompts = [row.size for row in sweep.rows if row.kind == "prefill"]
        assert len(prompts) < 2 or sum(prompts) <= self.block_tokens
        super().run(sweep)
        lengths = [segment.end for row in sweep.rows for segment in row.segments]
        self.most_bytes = max(self.most_bytes, sum(map(self.size.of, lengths)))

    @staticmethod
    def begin(state: State | None) -> None:
        assert state is not None
        if state.content is None:
            state.content = () if state.origin is None else state.origin.content
            state.origin = None

    def compute(self, segment: Segment) -> None:
        assert segment.state is not None
        prefix = segment.state.content
        assert isinstance(prefix, tuple)
        assert len(prefix) == segment.start
        for i, token in enumerate(segment.tokens):
            prefix = (*prefix, token)
            self.answer(segment, i, prefix)
        segment.state.content = prefix


@settings(derandomize=True, max_examples=300, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(SPECS, POLICIES, st.builds(StateSize, st.integers(0, 50), st.integers(0, 3)), st.integers(0, 300), st.integers(1, 10))
def test_every_answer_comes_from_the_right_prefix(
    specs: list[Spec], policy: ResolvedPolicy, size: StateSize, spare: int, first: int
) -> None:
    block_tokens = policy.block_tokens or 1
    machine = StateMachine(policy, specs, size, block_tokens)
    sizes = SingleScheduler(policy, block_tokens=1, capacity_bytes=0, size=size)
    capacity = max(sizes.bytes_needed(len(work.tokens), work.limits) for work in machine.works) + spare
    scheduler = SingleScheduler(policy, block_tokens=block_tokens, capacity_bytes=capacity, size=size)
    assert_answers(scheduler, machine, specs, first=first)
    assert machine.most_bytes <= capacity
    assert not [continuation for work in machine.works for continuation in work.continuations if continuation.state is not None]


def test_a_block_decodes_as_many_sequences_as_it_has_slots() -> None:
    policy = ResolvedPolicy(gpu_batch_size=3, num_gpu_batches=2, gpu_batch_tokens=8)
    specs = [Spec((i,), False, ((5, 5),)) for i in range(20)]
    machine = StateMachine(policy, specs, StateSize(1, 1), 100)
    scheduler = SingleScheduler(policy, block_tokens=100, capacity_bytes=10_000, size=StateSize(1, 1))
    scheduler.add(machine.works)
    rows = []
    while scheduler.has_work():
        sweep = scheduler.next_sweep()
        rows.append([len(row.segments) for row in sweep.rows])
        machine.run(sweep)
        scheduler.end_sweep()
    assert rows == ([[1] * 6] + [[3, 3]] * 4) * 3 + [[1] * 2] + [[2]] * 4


@pytest.mark.parametrize(("limits", "needed"), [([], 24), ([1], 24), ([5], 32), ([5, 5, 1], 88)])
def test_each_completion_needs_a_state_of_its_own(limits: list[int], needed: int) -> None:
    scheduler = SingleScheduler(
        ResolvedPolicy(gpu_batch_size=64, gpu_batch_tokens=256), block_tokens=10, capacity_bytes=99, size=StateSize(4, 2)
    )
    assert scheduler.bytes_needed(10, limits) == needed


def test_abandoned_work_frees_its_memory() -> None:
    policy, size = ResolvedPolicy(gpu_batch_size=2, num_gpu_batches=1, gpu_batch_tokens=8), StateSize(0, 1)
    works = [PromptWork((*range(40), i), i % 2 == 0, [Continuation(20)]) for i in range(4)]
    machine = StateMachine(policy, [], size, 1000)
    machine.ends = {continuation: (work.tokens, 20) for work in works for continuation in work.continuations}
    scheduler = SingleScheduler(policy, block_tokens=1000, capacity_bytes=125, size=size)
    scheduler.add(works)
    for _ in range(3):
        machine.run(scheduler.next_sweep())
        scheduler.end_sweep()
    assert set(scheduler.abandon()) == set(works)
    assert not scheduler.has_work()
    again = [Spec((1, 2, 3), True, ((100, 100), (100, 3)))][:1]
    fresh = StateMachine(policy, again, size, 1000)
    scheduler.add(fresh.works)
    assert not scheduler.next_sweep().rows, "two completions of 102 tokens need more than there is"
    scheduler.abandon()
    fits = [Spec((1, 2, 3), True, ((100, 100),))]
    assert_answers(scheduler, StateMachine(policy, fits, size, 1000), fits, first=1)
