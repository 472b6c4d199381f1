"""Schedulers, executed symbolically: what is computed is the prefix that it was computed from."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from flexgen_helm.schedule.rows import Continuation, Segment, Sweep
from flexgen_helm.schedule.work import PromptWork, Scheduler
from flexgen_helm.types import ResolvedPolicy

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """A job: tokens, whether it is scored, new tokens of each completion, and after how many each of them ends."""

    tokens: Prefix
    score: bool
    limits: tuple[tuple[int, int], ...]

    def completion(self, limit: int, end: int) -> list[int]:
        """The tokens of a completion."""
        tokens: list[int] = []
        while len(tokens) < min(limit, end):
            tokens.append(hash((*self.tokens, *tokens)) % 5)
        return tokens


TOKENS = st.builds(
    lambda prefix, rest: (7,) * prefix + rest,
    st.sampled_from([0, 1, 31, 32, 33, 70]),
    st.lists(st.integers(0, 2), min_size=1, max_size=40).map(tuple),
)
LIMITS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=3).map(tuple)
SPEC = st.builds(Spec, TOKENS, st.booleans(), LIMITS).filter(lambda spec: spec.score or spec.limits)
SPECS = st.lists(SPEC, min_size=1, max_size=10, unique_by=lambda spec: spec.tokens)
POLICIES = st.builds(
    ResolvedPolicy,
    gpu_batch_size=st.integers(1, 5),
    num_gpu_batches=st.integers(1, 3),
    gpu_batch_tokens=st.integers(1, 50),
    block_tokens=st.integers(1, 200),
    cache=st.sampled_from([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]),  # with the second, decode rows come first
)


class Machine:
    """Stands for the executor. Completions emit, and scores are, a function of the prefix that they follow."""

    def __init__(self, policy: ResolvedPolicy, specs: list[Spec]) -> None:
        self.policy = policy
        self.ends: dict[Continuation, tuple[Prefix, int]] = {}
        self.works: list[PromptWork] = []
        for spec in specs:
            work = PromptWork(spec.tokens, spec.score, [Continuation(limit) for limit, _ in spec.limits])
            self.works.append(work)
            for continuation, (_, end) in zip(work.continuations, spec.limits, strict=True):
                self.ends[continuation] = (spec.tokens, end)
        self.computed_tokens = 0

    def run(self, sweep: Sweep) -> None:
        """Compute a sweep."""
        for row in sweep.rows:
            for segment in row.segments:
                self.compute(segment)
                self.computed_tokens += len(segment.tokens) if row.kind == "prefill" else 0

    def compute(self, segment: Segment) -> None:
        """Compute a segment."""
        raise NotImplementedError

    def answer(self, segment: Segment, offset: int, prefix: Prefix) -> None:
        """Do what is wanted at a token, which closes ``prefix``."""
        for request in segment.logit_requests:
            if request.offset != offset:
                continue
            for scores, index in request.targets:
                assert scores.logprobs[index] is None
                scores.logprobs[index] = hash((*prefix, scores.tokens[index])) % 97
            for continuation in request.continuations:
                prompt, end = self.ends[continuation]
                assert (*prompt, *continuation.tokens) == prefix
                continuation.tokens.append(hash(prefix) % 5)
                continuation.done = len(continuation.tokens) >= min(end, continuation.max_new_tokens)


def assert_answers(scheduler: Scheduler, machine: Machine, specs: list[Spec], *, first: int) -> None:
    """Run all work, the ``first`` at once and the rest a sweep later, and compare what comes out."""
    scheduler.add(machine.works[:first])
    waiting, finished = machine.works[first:], []
    for _ in range(5000):
        if not scheduler.has_work():
            break
        machine.run(scheduler.next_sweep())
        finished += scheduler.end_sweep()
        scheduler.add(waiting)
        waiting = []
    assert not scheduler.has_work()
    assert sorted(map(id, finished)) == sorted(map(id, machine.works))
    assert scheduler.tokens_left() == (0, 0)
    for spec, work in zip(specs, machine.works, strict=True):
        assert [continuation.tokens for continuation in work.continuations] == [
            spec.completion(*limits) for limits in spec.limits
        ]
        if spec.score:
            found = [value for node in work.node.path() if node.scores is not None for value in node.scores.logprobs]
            assert found[1:] == [hash(spec.tokens[: i + 1]) % 97 for i in range(1, len(spec.tokens))]
