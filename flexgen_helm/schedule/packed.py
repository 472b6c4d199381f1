"""The scheduler of packed rows: prompts share what they have in common, K and V lie in pages (docs/architecture.md)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from flexgen_helm.memory.pages import PagePool, num_pages
from flexgen_helm.schedule.page_tables import Placement
from flexgen_helm.schedule.rows import Continuation, LogitRequest, Segment, Sweep, pack_decode, pack_prefill
from flexgen_helm.schedule.tree import Node, build_tree, common_prefix_length
from flexgen_helm.schedule.work import PromptWork, decode_position
from flexgen_helm.types import ResolvedPolicy

CUT_FROM = 0.75
"""A block of scoring work is cut where neighbours share least, in the last quarter of its tokens."""


class PackedScheduler:
    """Plans sweeps in the order of the prefix tree. See `Scheduler` for what its methods promise."""

    def __init__(
        self, policy: ResolvedPolicy, *, block_tokens: int, pool: PagePool, keep_all: bool = False, prompt_row_cost: float = 0.0
    ) -> None:
        """Plan nothing yet.

        Args:
            policy: Sizes of rows and block.
            block_tokens: Prompt tokens of a sweep.
            pool: Pages that may be kept.
            keep_all: Whether K and V of scoring work are kept for every layer, as orders other than the column order need.
            prompt_row_cost: Time of a row of prompts in units of a sweep that only decodes, see `_worthwhile`.
        """
        self._policy = policy
        self._block_tokens = block_tokens
        self._pool = pool
        self._placement = Placement(pool)
        self._keep_all, self._prompt_row_cost = keep_all, prompt_row_cost
        self._waiting: deque[PromptWork] = deque()
        self._filling: list[PromptWork] = []
        self._decoding: list[tuple[PromptWork, Continuation]] = []
        self._scoring: deque[PromptWork] = deque()
        self._in_sweep: list[Node] = []
        self._swept: list[PromptWork] = []
        self._ends: dict[Node, PromptWork] = {}
        self._prompt_tokens_left = 0
        self._idle_share = 0.0
        """Of the slots, by prompts that wait for their row to fill, summed over sweeps."""

    @property
    def capacity_bytes(self) -> int:
        """Memory for pages that are kept."""
        return self._pool.capacity * self._pool.page_bytes

    def bytes_needed(self, length: int, limits: Sequence[int]) -> int:
        """Kept pages of a prompt alone; one that generates at most one token needs none in column order."""
        if max(limits, default=0) <= 1 and not self._keep_all:
            return 0
        pages = num_pages(0, length) + sum(_continuation_pages(length, limit) for limit in limits)
        return pages * self._pool.page_bytes

    def add(self, works: list[PromptWork]) -> None:
        """Take work in; prompts added together share their prefixes."""
        for work, node in zip(works, build_tree([work.tokens for work in works]), strict=True):
            work.node = node
            self._ends[node] = work
            for upper in node.path():
                upper.users += work.generating
                if work.score and upper.logprobs is None:
                    upper.logprobs = [None] * len(upper.tokens)
        nodes = {node for work in works for node in work.node.path()}
        self._prompt_tokens_left += sum(len(node.tokens) for node in nodes)
        ordered = sorted(works, key=lambda work: work.tokens)
        self._waiting.extend(work for work in ordered if work.generating)
        self._scoring.extend(work for work in ordered if not work.generating)

    def has_work(self) -> bool:
        """Whether another sweep is needed."""
        return bool(self._waiting or self._filling or self._decoding or self._scoring)

    def tokens_left(self) -> tuple[int, int]:
        """Prompt tokens still to be computed (prefixes that will be computed again not counted) and new tokens, at most."""
        if not self.has_work():
            return 0, 0
        new = sum(continuation.max_new_tokens - len(continuation.tokens) for _, continuation in self._decoding)
        new += sum(
            continuation.max_new_tokens for work in (*self._waiting, *self._filling) for continuation in work.continuations
        )
        return self._prompt_tokens_left, new

    def next_sweep(self) -> Sweep:
        """Plan one sweep: every live completion takes a step, prompts fill the block's tokens."""
        self._in_sweep, self._swept, self._placement.num_transient = [], [], 0
        decode = [_decode_segment(work, continuation) for work, continuation in self._decoding]
        prefill: list[Segment] = []
        tokens = self._worthwhile(self._take_prompts())
        used = 0
        for work in self._filling:
            if used == tokens:
                break
            used += self._schedule(work, prefill, tokens - used)
        for work in self._scoring_block(self._block_tokens - used, alone=not decode and not prefill):
            self._schedule(work, prefill, None)
        rows = pack_prefill(prefill, self._policy) + pack_decode(decode, self._policy)
        device, *offloaded = self._pool.high_water
        return Sweep(rows, device, self._placement.num_transient, (offloaded[0], offloaded[1]))

    def end_sweep(self) -> list[PromptWork]:
        """Account for a sweep that was computed and whose logit requests were answered; returns the work that is complete."""
        scoring = [work for work in self._swept if not work.generating]
        for work in scoring:
            answered = self._finish_scoring(work)
            assert answered, "a scored prompt was left without an answer"
        finished = list(dict.fromkeys(scoring))
        for node in self._in_sweep:
            if node.users == 0:
                self._placement.drop(node)
        for work in [work for work in self._filling if _filled(work)]:
            self._filling.remove(work)
            self._decoding.extend((work, continuation) for continuation in work.continuations)
        ended = [work for work, continuation in self._decoding if continuation.done]
        self._decoding = [(work, continuation) for work, continuation in self._decoding if not continuation.done]
        for work in dict.fromkeys(ended):
            for continuation in work.continuations:
                if continuation.done:
                    self._placement.drop_continuation(continuation, work.node)
            if all(continuation.done for continuation in work.continuations):
                self._retire(work)
                finished.append(work)
        for work in finished:
            del self._ends[work.node]
        return finished

    def abandon(self) -> list[PromptWork]:
        """Drop all work after a failure; returns what was dropped."""
        dropped = list(dict.fromkeys([*self._waiting, *self._filling, *(work for work, _ in self._decoding), *self._scoring]))
        for work in dropped:
            for node in work.node.path():
                self._placement.drop(node)
            for continuation in work.continuations:
                self._placement.drop_continuation(continuation, work.node)
        self._waiting.clear()
        self._scoring.clear()
        self._filling, self._decoding = [], []
        self._ends.clear()
        self._prompt_tokens_left = 0
        return dropped

    # Generating work -------------------------------------------------------------------------------------------------

    def _take_prompts(self) -> int:
        """Admit prompts as long as the block has room for them; returns the tokens that are missing of those admitted."""
        nodes: set[Node] = set()

        def missing(work: PromptWork) -> int:
            new = [node for node in work.node.path() if node not in nodes]
            nodes.update(new)
            return sum(len(node.tokens) - (node.pages.scheduled if node.pages is not None else 0) for node in new)

        tokens = sum(map(missing, self._filling))
        while tokens < self._block_tokens and self._waiting and self._admit(self._waiting[0]):
            work = self._waiting.popleft()
            self._filling.append(work)
            tokens += missing(work)
        return tokens

    def _worthwhile(self, tokens: int) -> int:
        """How many of the missing prompt tokens are computed in this sweep.

        A row costs the same however few tokens are in it. While more prompts wait for memory, those that do not fill a row wait
        for what finished sequences make room for, until their idle slots have cost as much as the padding would: never more
        than twice as bad as what turns out best.
        """
        if tokens >= self._block_tokens:
            return self._block_tokens
        rest = tokens % self._policy.gpu_batch_tokens
        if not (rest and self._waiting and self._decoding) or self._scoring:
            self._idle_share = 0.0
            return tokens
        idle = rest / tokens * sum(len(work.continuations) for work in self._filling)
        self._idle_share += idle / (idle + len(self._decoding))
        if self._idle_share < self._prompt_row_cost * (1 - rest / self._policy.gpu_batch_tokens):
            return tokens - rest
        self._idle_share = 0.0
        return tokens

    def _admit(self, work: PromptWork) -> bool:
        """Reserve slots and pages for a prompt and all its completions, so that nothing is ever pre-empted."""
        taken = len(self._decoding) + sum(len(filling.continuations) for filling in self._filling)
        if taken and taken + len(work.continuations) > self._policy.block_size:
            return False
        path = work.node.path()
        if not self._fits(work, path) and not taken:
            self._drop_prefixes()
        if not self._fits(work, path):
            return False
        for node in path:
            self._placement.place(node, kept=True)
        for continuation in work.continuations:
            self._placement.place_continuation(continuation, work.node)
        return True

    def _fits(self, work: PromptWork, path: list[Node]) -> bool:
        return self._placement.fits(
            self._placement.missing(path) + sum(_continuation_pages(len(work.tokens), limit) for limit in work.limits)
        )

    def _drop_prefixes(self) -> None:
        """Drop what earlier work left behind for later, when nothing is live that would free pages: it is computed again."""
        for work in (*self._waiting, *self._scoring):
            for node in work.node.path():
                self._placement.drop(node)

    def _retire(self, work: PromptWork) -> None:
        work.done = True
        for node in work.node.path():
            node.users -= 1
            if node.users == 0:
                self._placement.drop(node)

    # Scoring work ----------------------------------------------------------------------------------------------------

    def _scoring_block(self, budget: int, *, alone: bool) -> list[PromptWork]:
        """Take scoring work for one sweep, whole prompts only, cut where the next shares least with the last."""
        block: list[PromptWork] = []
        cost: list[int] = [0]
        shared: list[int] = []
        while self._scoring and (cost[-1] < budget):
            work = self._scoring[0]
            if self._finish_scoring(work):
                self._swept.append(self._scoring.popleft())
                continue
            common = common_prefix_length(block[-1].tokens, work.tokens) if block else 0
            total = cost[-1] + len(work.tokens) - common
            if total > budget and (block or not alone):
                break
            if self._kept(work) and not self._reserve_kept(work):
                break
            block.append(self._scoring.popleft())
            shared.append(common)
            cost.append(total)
        cut = self._cut(block, shared, cost, budget) if self._scoring else len(block)
        self._scoring.extendleft(reversed(block[cut:]))
        return block[:cut]

    def _cut(self, block: list[PromptWork], shared: list[int], cost: list[int], budget: int) -> int:
        """Where to end a full block: at its end, or earlier in its last quarter if less of a prefix is computed again there."""
        best, least = len(block), common_prefix_length(block[-1].tokens, self._scoring[0].tokens) if block else 0
        for i in range(len(block) - 1, 0, -1):
            if cost[i] < CUT_FROM * budget:
                break
            if shared[i] < least:
                best, least = i, shared[i]
        return best

    def _kept(self, work: PromptWork) -> bool:
        """Whether scoring work shares its tree with generating work, whose pages it then reads."""
        return self._keep_all or work.node.path()[0].users > 0

    def _reserve_kept(self, work: PromptWork) -> bool:
        path = work.node.path()
        if not self._placement.fits(self._placement.missing(path)):
            return False
        for node in path:
            self._placement.place(node, kept=True)
        return True

    def _finish_scoring(self, work: PromptWork) -> bool:
        work.done = work.done or (work.scored() and all(continuation.done for continuation in work.continuations))
        return work.done

    # Segments --------------------------------------------------------------------------------------------------------

    def _schedule(self, work: PromptWork, segments: list[Segment], budget: int | None) -> int:
        """Append what is missing of a prompt, up to ``budget`` tokens; returns the number of tokens."""
        self._swept.append(work)
        used = 0
        kept = work.generating or self._kept(work)
        for node in work.node.path():
            self._placement.place(node, kept=kept)
            assert node.pages is not None
            missing = len(node.tokens) - node.pages.scheduled
            count = missing if budget is None else min(missing, budget - used)
            if count > 0:
                segments.append(self._segment(node, count))
                used += count
            if count < missing:
                break
        return used

    def _segment(self, node: Node, count: int) -> Segment:
        pages = node.pages
        assert pages is not None
        offset = pages.scheduled
        pages.scheduled += count
        self._in_sweep.append(node)
        self._prompt_tokens_left -= max(0, pages.scheduled - node.num_seen)
        node.num_seen = max(node.num_seen, pages.scheduled)
        logit_requests = self._logit_requests(node, offset, count)
        copy = pages.copy if offset == 0 else None
        tokens, start = node.tokens[offset : offset + count], node.start + offset
        return Segment(tokens, start, pages.table, pages.kept, copy, logit_requests, owner=node)

    def _logit_requests(self, node: Node, offset: int, count: int) -> list[LogitRequest]:
        logit_requests: list[LogitRequest] = []
        inner = range(offset, min(offset + count, len(node.tokens) - 1))
        if node.logprobs is not None:
            logit_requests = [LogitRequest(i - offset, ((node, i + 1),), ()) for i in inner if node.logprobs[i + 1] is None]
        if offset + count == len(node.tokens):
            # First tokens are chosen whenever the prompt's last token is computed, be it for other work before admission.
            last = tuple((c, 0) for c in node.children if c.logprobs is not None and c.logprobs[0] is None)
            work = self._ends.get(node)
            continuations = (
                tuple(continuation for continuation in work.continuations if not continuation.tokens)
                if work is not None
                else ()
            )
            if last or continuations:
                logit_requests.append(LogitRequest(count - 1, last, continuations))
        return logit_requests


def _filled(work: PromptWork) -> bool:
    pages = work.node.pages
    return pages is not None and pages.scheduled == len(work.node.tokens)


def _decode_segment(work: PromptWork, continuation: Continuation) -> Segment:
    copy = continuation.copy if len(continuation.tokens) == 1 else None
    logit_requests = [LogitRequest(0, (), (continuation,))]
    return Segment(
        (continuation.tokens[-1],),
        decode_position(work, continuation),
        continuation.table,
        True,
        copy,
        logit_requests,
        owner=continuation,
    )


def _continuation_pages(length: int, max_new_tokens: int) -> int:
    """Pages of a completion's own behind a prompt of ``length`` tokens; its last token is never attended to."""
    return num_pages(length, length + max_new_tokens - 1)
