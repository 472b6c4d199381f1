"""The scheduler of single rows: whole prompts, a row for each, nothing shared; every sequence has a state of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_helm.schedule.rows import Continuation, LogitRequest, Row, Segment, State, Sweep, pack_decode
from flexgen_helm.schedule.tree import Node, Scores
from flexgen_helm.schedule.work import PromptWork, decode_position
from flexgen_helm.types import ResolvedPolicy


@dataclass(frozen=True)
class StateSize:
    """Bytes that a sequence carries from one sweep to the next."""

    per_sequence: int
    per_token: int

    def of(self, length: int) -> int:
        """Bytes of a sequence of ``length`` tokens."""
        return self.per_sequence + length * self.per_token


class SingleScheduler:
    """Plans sweeps in the order of arrival. See `Scheduler` for what its methods promise."""

    def __init__(self, policy: ResolvedPolicy, *, block_tokens: int, capacity_bytes: int, size: StateSize) -> None:
        self._policy = policy
        self._block_tokens = block_tokens
        self._capacity, self._free, self._size = capacity_bytes, capacity_bytes, size
        self._generating: deque[PromptWork] = deque()
        self._scoring: deque[PromptWork] = deque()
        self._decoding: list[tuple[PromptWork, Continuation]] = []
        self._prompts: list[PromptWork] = []
        self._reserved: dict[PromptWork, int] = {}
        self._block_tokens_left = self._slots_taken = 0

    @property
    def capacity_bytes(self) -> int:
        """Memory for the states of all sequences."""
        return self._capacity

    def bytes_needed(self, length: int, limits: Sequence[int]) -> int:
        """The states of a prompt: its completions begin with copies of its own, so each has a whole one."""
        return sum(self._size.of(length + max(0, limit - 1)) for limit in limits or [0])

    def add(self, works: list[PromptWork]) -> None:
        """Take work in."""
        for work in works:
            work.node = Node(None, 0, work.tokens, scores=Scores(work.tokens) if work.score else None)
            (self._generating if work.generating else self._scoring).append(work)

    def has_work(self) -> bool:
        """Whether another sweep is needed."""
        return bool(self._generating or self._scoring or self._decoding)

    def tokens_left(self) -> tuple[int, int]:
        """Prompt tokens still to be computed and new tokens, at most."""
        waiting = (*self._generating, *self._scoring)
        new = sum(continuation.max_new_tokens - len(continuation.tokens) for _, continuation in self._decoding)
        new += sum(
            continuation.max_new_tokens
            for work in (*waiting, *self._prompts)
            for continuation in work.continuations
            if continuation.max_new_tokens > 1
        )
        return sum(len(work.tokens) for work in waiting), new

    def next_sweep(self) -> Sweep:
        """Plan one sweep."""
        self._prompts, self._block_tokens_left, self._slots_taken = [], self._block_tokens, len(self._decoding)
        self._admit(self._generating)
        self._admit(self._scoring)
        decode = [_decode_segment(work, continuation) for work, continuation in self._decoding]
        return Sweep([_prompt_row(work) for work in self._prompts] + pack_decode(decode, self._policy))

    def end_sweep(self) -> list[PromptWork]:
        """Account for a sweep."""
        for work in self._prompts:
            assert work.scored(), "a scored prompt was left without an answer"
            self._decoding.extend((work, continuation) for continuation in work.continuations)
        swept = dict.fromkeys([*self._prompts, *(work for work, _ in self._decoding)])
        self._prompts = []
        self._decoding = [(work, continuation) for work, continuation in self._decoding if not continuation.done]
        finished = [work for work in swept if all(continuation.done for continuation in work.continuations)]
        for work in swept:
            for continuation in work.continuations:
                if continuation.done:
                    continuation.state = None
        for work in finished:
            self._free += self._reserved.pop(work)
        return finished

    def abandon(self) -> list[PromptWork]:
        """Drop all work."""
        live = [*self._prompts, *(work for work, _ in self._decoding)]
        dropped = list(dict.fromkeys([*self._generating, *self._scoring, *live]))
        for work in dropped:
            for continuation in work.continuations:
                continuation.state = None
        self._generating.clear()
        self._scoring.clear()
        self._prompts, self._decoding = [], []
        self._reserved.clear()
        self._free = self._capacity
        return dropped

    def _admit(self, queue: deque[PromptWork]) -> None:
        """Take work from the front of a queue while the block has tokens and slots for it, and memory lasts."""
        while queue and self._has_room(queue[0]) and self._reserve(queue[0]):
            work = queue.popleft()
            self._prompts.append(work)
            self._block_tokens_left -= len(work.tokens)
            self._slots_taken += len(work.continuations) if work.generating else 0

    def _has_room(self, work: PromptWork) -> bool:
        """Whether a prompt fits into the block; an empty one takes any."""
        if self._prompts and len(work.tokens) > self._block_tokens_left:
            return False
        if not work.generating or not self._slots_taken:
            return True
        return self._slots_taken + len(work.continuations) <= self._policy.block_size

    def _reserve(self, work: PromptWork) -> bool:
        needed = self.bytes_needed(len(work.tokens), work.limits)
        if needed > self._free:
            return False
        self._free -= needed
        self._reserved[work] = needed
        return True


def _prompt_row(work: PromptWork) -> Row:
    state = State()
    last = len(work.tokens) - 1
    scores = work.node.scores
    logit_requests = [LogitRequest(i, ((scores, i + 1),), ()) for i in range(last)] if scores is not None else []
    if work.continuations:
        logit_requests.append(LogitRequest(last, (), tuple(work.continuations)))
        _hand_on(state, work.continuations)
    return Row("prefill", len(work.tokens), [Segment(work.tokens, 0, logit_requests=logit_requests, state=state)])


def _hand_on(state: State, continuations: list[Continuation]) -> None:
    """All completions but the last begin with a copy of their prompt's state; the last takes it over."""
    for continuation in continuations:
        continuation.state = State(origin=state)
    continuations[-1].state = state


def _decode_segment(work: PromptWork, continuation: Continuation) -> Segment:
    request = LogitRequest(0, (), (continuation,))
    return Segment(
        (continuation.tokens[-1],), decode_position(work, continuation), logit_requests=[request], state=continuation.state
    )
