"""The scheduler, executed symbolically: every slot of every page holds the prefix that attention will take it for."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from flexgen_helm.memory.pages import PAGE_TOKENS, PagePool, num_pages
from flexgen_helm.schedule.packed import PackedScheduler
from flexgen_helm.schedule.rows import Fork, Segment, Sweep
from flexgen_helm.schedule.work import Work
from flexgen_helm.types import Policy

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """A job: tokens, whether it is scored, new tokens of each completion, and after how many each of them ends."""

    tokens: Prefix
    score: bool
    limits: tuple[tuple[int, int], ...]


class SymbolicMachine:
    """Stands for the executor: slots hold the prefix that their token closes; completions emit a function of their prefix."""

    def __init__(self, policy: Policy, specs: list[Spec]) -> None:
        self.policy = policy
        self.slots: dict[tuple[bool, int], Prefix] = {}
        self.ends = {}
        self.works = []
        for spec in specs:
            work = Work(spec.tokens, spec.score, [Fork(limit) for limit, _ in spec.limits])
            self.works.append(work)
            for fork, (_, end) in zip(work.forks, spec.limits, strict=True):
                self.ends[fork] = (spec.tokens, end)
        self.computed_tokens = 0

    def run(self, sweep: Sweep) -> None:
        for key in [key for key in self.slots if not key[0]]:
            del self.slots[key]  # what is not kept is gone with the layer
        for row in sweep.rows:
            assert 0 < row.num_tokens <= row.size
            assert row.size == (self.policy.gpu_batch_tokens if row.kind == "prefill" else self.policy.gpu_batch_size)
            for segment in row.segments:
                self._compute(segment)
                self.computed_tokens += len(segment.tokens) if row.kind == "prefill" else 0

    def _compute(self, segment: Segment) -> None:
        if segment.copy is not None:
            source, target, count = segment.copy
            for i in range(count):
                moved = self.slots[segment.kept, source * PAGE_TOKENS + i]
                self.slots[segment.kept, target * PAGE_TOKENS + i] = moved
        wants = {want.offset: want for want in segment.wants}
        for i, token in enumerate(segment.tokens):
            position = segment.start + i
            before = [self.slots[segment.kept, self._slot(segment, p)] for p in range(position)]
            prefix = (*(before[-1] if before else ()), token)
            assert [held == prefix[: p + 1] for p, held in enumerate(before)] == [True] * position
            self.slots[segment.kept, self._slot(segment, position)] = prefix
            if i in wants:
                for node, index in wants[i].targets:
                    assert node.start + index == position + 1
                    assert node.logprobs is not None
                    node.logprobs[index] = hash((*prefix, node.tokens[index])) % 97
                for fork in wants[i].forks:
                    prompt, end = self.ends[fork]
                    assert (*prompt, *fork.tokens) == prefix
                    fork.tokens.append(hash(prefix) % 5)
                    fork.done = len(fork.tokens) >= min(end, fork.max_new_tokens)

    @staticmethod
    def _slot(segment: Segment, position: int) -> int:
        return segment.table[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS


TOKENS = st.builds(
    lambda prefix, rest: (7,) * prefix + rest,
    st.sampled_from([0, 1, 31, 32, 33, 70]),
    st.lists(st.integers(0, 2), min_size=1, max_size=40).map(tuple),
)
LIMITS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=3).map(tuple)
SPEC = st.builds(Spec, TOKENS, st.booleans(), LIMITS).filter(lambda spec: spec.score or spec.limits)
SPECS = st.lists(SPEC, min_size=1, max_size=10, unique_by=lambda spec: spec.tokens)
POLICIES = st.builds(Policy, st.integers(1, 5), st.integers(1, 3), st.integers(1, 50), st.integers(1, 200))


def pages_alone(work: Work) -> int:
    length = len(work.tokens)
    return num_pages(0, length) + sum(num_pages(length, length + fork.max_new_tokens - 1) for fork in work.forks)


def expected_tokens(spec: Spec, limit: int, end: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < min(limit, end):
        tokens.append(hash((*spec.tokens, *tokens)) % 5)
    return tokens


@settings(derandomize=True, max_examples=300, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(SPECS, POLICIES, st.integers(0, 40), st.booleans(), st.integers(1, 10))
def test_every_answer_comes_from_the_right_prefix(
    specs: list[Spec], policy: Policy, spare: int, keep_all: bool, first: int
) -> None:
    machine = SymbolicMachine(policy, specs)
    pool = PagePool(max(pages_alone(work) for work in machine.works) + spare)
    scheduler = PackedScheduler(policy, block_tokens=policy.block_tokens or 1, pool=pool, keep_all=keep_all)
    scheduler.add(machine.works[:first])
    waiting, finished = machine.works[first:], []
    for _ in range(5000):
        if not scheduler.has_work():
            break
        sweep = scheduler.next_sweep()
        machine.run(sweep)
        finished += scheduler.end_sweep()
        scheduler.add(waiting)
        waiting = []
    assert not scheduler.has_work()
    assert sorted(map(id, finished)) == sorted(map(id, machine.works))
    assert pool.num_used == 0
    assert scheduler.tokens_left() == (0, 0)
    for spec, work in zip(specs, machine.works, strict=True):
        for fork, (limit, end) in zip(work.forks, spec.limits, strict=True):
            assert fork.tokens == expected_tokens(spec, limit, end)
        if spec.score:
            found = [value for node in work.node.path() for value in node.logprobs or ()]
            assert found[1:] == [hash(spec.tokens[: i + 1]) % 97 for i in range(1, len(spec.tokens))]


def test_work_that_others_have_computed_before_its_turn_is_not_lost() -> None:
    """A prompt that ends inside a scored one, which runs first because no slot is free."""
    test = test_every_answer_comes_from_the_right_prefix.hypothesis.inner_test  # type: ignore[attr-defined]
    specs = [
        Spec((7,) * 33 + (2, 1, 2), False, ((8, 19), (9, 5), (28, 32))),
        Spec((1, 2, 2), True, ()),
        Spec((1,), False, ((7, 11), (2, 15), (21, 10), (5, 1))),
    ]
    test(specs, Policy(2, 1, 47, 194), 14, False, 1)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(SPECS)
def test_a_large_block_computes_each_prefix_once(specs: list[Spec]) -> None:
    policy = Policy(64, 4, 16, 10_000)
    machine = SymbolicMachine(policy, specs)
    scheduler = PackedScheduler(policy, block_tokens=10_000, pool=PagePool(10_000))
    scheduler.add(machine.works)
    while scheduler.has_work():
        machine.run(scheduler.next_sweep())
        scheduler.end_sweep()
    needed = [spec for spec in specs if spec.score or spec.limits]
    assert machine.computed_tokens >= len({spec.tokens[: i + 1] for spec in needed for i in range(len(spec.tokens) - 1)})
    assert machine.computed_tokens <= len({spec.tokens[: i + 1] for spec in specs for i in range(len(spec.tokens))})


def test_abandoned_work_leaves_no_page_behind() -> None:
    policy = Policy(2, 1, 8, 8)
    pool = PagePool(100)
    scheduler = PackedScheduler(policy, block_tokens=8, pool=pool)
    works = [Work((*range(40), i), i % 2 == 0, [Fork(20)]) for i in range(4)]
    machine = SymbolicMachine(policy, [])
    machine.ends = {fork: (work.tokens, 20) for work in works for fork in work.forks}
    scheduler.add(works)
    for _ in range(7):
        machine.run(scheduler.next_sweep())
        scheduler.end_sweep()
    assert pool.num_used > 0
    assert set(scheduler.abandon()) == set(works)
    assert pool.num_used == 0
    assert not scheduler.has_work()
