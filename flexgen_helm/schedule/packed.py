"""The scheduler of packed rows: prompts share what they have in common, K and V lie in pages (docs/architecture.md)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from flexgen_helm.kv_cache.pages import Form, PagePool
from flexgen_helm.schedule.page_tables import PageTables
from flexgen_helm.schedule.prompt_gate import PromptGate
from flexgen_helm.schedule.rows import Continuation, Segment, Sweep, in_order, pack_decode, pack_prefill
from flexgen_helm.schedule.scoring import ScoringQueue
from flexgen_helm.schedule.segments import decode_segment, prompt_segment
from flexgen_helm.schedule.tree import Node, Scores, build_tree
from flexgen_helm.schedule.work import PromptWork
from flexgen_helm.types import ResolvedPolicy


class PackedScheduler:
    """Plans sweeps in the order of the prefix tree. See `Scheduler` for what its methods promise."""

    def __init__(
        self,
        policy: ResolvedPolicy,
        *,
        block_tokens: int,
        pools: Mapping[Form, PagePool],
        keep_all: bool = False,
        divided: bool = False,
        prompt_row_cost: float = 0.0,
    ) -> None:
        """Plan nothing yet.

        Args:
            policy: Sizes of rows and block.
            block_tokens: Prompt tokens of a sweep.
            pools: Pages that may be kept, by form; see `PageTables`.
            keep_all: Whether K and V of scoring work are kept for every layer, as orders other than the column order need.
            divided: See `PageTables`.
            prompt_row_cost: Time of a row of prompts in units of a sweep that only decodes, see `PromptGate`.
        """
        self._policy = policy
        self._block_tokens = block_tokens
        self._tables = PageTables(pools, keep_all=keep_all, divided=divided)
        self._keep_all = keep_all
        self._gate = PromptGate(row_tokens=policy.gpu_batch_tokens, block_tokens=block_tokens, row_cost=prompt_row_cost)
        self._waiting: deque[PromptWork] = deque()
        self._filling: list[PromptWork] = []
        self._decoding: list[tuple[PromptWork, Continuation]] = []
        self._scoring = ScoringQueue(self._reserve_scored)
        self._in_sweep: list[Node] = []
        self._swept: list[PromptWork] = []
        self._ends: dict[Node, PromptWork] = {}
        self._prompt_tokens_left = 0

    @property
    def capacity_bytes(self) -> int:
        """Memory for pages that are kept."""
        return self._tables.capacity_bytes

    @property
    def holds_back(self) -> bool:
        """Whether prompts that have their pages wait for a sweep."""
        return bool(self._filling)

    def bytes_needed(self, length: int, limits: Sequence[int]) -> int:
        """Kept pages of a prompt alone; one that generates at most one token needs none in column order."""
        if max(limits, default=0) <= 1 and not self._keep_all:
            return 0
        return self._tables.bytes_needed(length, limits)

    def add(self, works: list[PromptWork]) -> None:
        """Take work in; prompts added together share their prefixes."""
        for work, node in zip(works, build_tree([work.tokens for work in works]), strict=True):
            work.node = node
            self._ends[node] = work
            for upper in node.path():
                upper.users += work.generating
                if work.score and upper.scores is None:
                    upper.scores = Scores(upper.tokens)
        nodes = {node for work in works for node in work.node.path()}
        self._prompt_tokens_left += sum(len(node.tokens) for node in nodes)
        ordered = sorted(works, key=lambda work: work.tokens)
        self._waiting.extend(work for work in ordered if work.generating)
        self._scoring.extend(work for work in ordered if not work.generating)
        self._tables.balance([*self._waiting, *(work for work in self._scoring if self._kept(work))])

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
        self._in_sweep, self._swept = [], []
        self._tables.begin_sweep()
        decode = [decode_segment(work, continuation) for work, continuation in self._decoding]
        prefill: list[Segment] = []
        tokens = self._let_in(self._take_prompts())
        used = 0
        for work in self._filling:
            if used == tokens:
                break
            used += self._schedule(work, prefill, tokens - used)
        block = self._scoring.take(self._block_tokens - used, alone=not decode and not prefill)
        self._swept.extend(block.answered)
        for work in block.works:
            self._schedule(work, prefill, None)
        rows = in_order(pack_prefill(prefill, self._policy), pack_decode(decode, self._policy), self._policy)
        return Sweep(rows, self._tables.storage())

    def end_sweep(self) -> list[PromptWork]:
        """Account for a sweep that was computed and whose logit requests were answered; returns the work that is complete."""
        scoring = [work for work in self._swept if not work.generating]
        for work in scoring:
            assert work.answered(), "a scored prompt was left without an answer"
        finished = list(dict.fromkeys(scoring))
        for node in self._in_sweep:
            self._tables.complete(node)
            if node.users == 0:
                self._tables.drop(node)
        for work in [work for work in self._filling if _filled(work)]:
            self._filling.remove(work)
            self._tables.join(work.node, work.continuations)
            self._decoding.extend((work, continuation) for continuation in work.continuations)
        ended = [work for work, continuation in self._decoding if continuation.done]
        self._decoding = [(work, continuation) for work, continuation in self._decoding if not continuation.done]
        for work in dict.fromkeys(ended):
            for continuation in work.continuations:
                if continuation.done:
                    self._tables.drop_continuation(continuation, work.node)
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
            self._tables.drop_prompt(work.node, work.continuations)
        self._waiting.clear()
        self._scoring.clear()
        self._filling, self._decoding = [], []
        self._ends.clear()
        self._prompt_tokens_left = 0
        return dropped

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

    def _let_in(self, missing: int) -> int:
        """Return how many of the prompt tokens that are missing are computed in this sweep."""
        return self._gate.let_in(
            missing,
            filling=sum(len(work.continuations) for work in self._filling),
            decoding=len(self._decoding),
            more_wait=bool(self._waiting) and not self._scoring,
        )

    def _admit(self, work: PromptWork) -> bool:
        """Reserve slots and pages for a prompt and all its completions, so that nothing is ever pre-empted."""
        taken = len(self._decoding) + sum(len(filling.continuations) for filling in self._filling)
        if taken and taken + len(work.continuations) > self._policy.block_size:
            return False
        if self._tables.reserve(work.node, work.continuations):
            return True
        if taken:
            return False
        self._drop_prefixes()
        return self._reserve_all(work) or (work.node.parent is not None and self._reserve_apart(work))

    def _reserve_all(self, work: PromptWork) -> bool:
        """Divide all memory as a prompt and its completions need it, and give them their pages."""
        self._tables.balance([work])
        return self._tables.reserve(work.node, work.continuations)

    def _reserve_apart(self, work: PromptWork) -> bool:
        """Do the same with a prompt that shares nothing any more: where others part from it, exact pages would stay."""
        old = work.node
        for upper in old.path():
            upper.users -= 1
        self._prompt_tokens_left += len(work.tokens) - (0 if old.children else len(old.tokens) - old.num_seen)
        work.node = Node(None, 0, work.tokens, scores=Scores(work.tokens) if work.score else None, users=1)
        del self._ends[old]
        self._ends[work.node] = work
        return self._reserve_all(work)

    def _drop_prefixes(self) -> None:
        """Drop what earlier work left behind for later, when nothing is live that would free pages: it is computed again."""
        for work in (*self._waiting, *self._scoring):
            self._tables.drop_prompt(work.node)

    def _retire(self, work: PromptWork) -> None:
        for node in work.node.path():
            node.users -= 1
            if node.users == 0:
                self._tables.drop(node)

    def _kept(self, work: PromptWork) -> bool:
        """Whether scoring work shares its tree with generating work, whose pages it then reads."""
        return self._keep_all or work.node.path()[0].users > 0

    def _reserve_scored(self, work: PromptWork) -> bool:
        """Reserve the pages that scoring work leaves to generating work, if any; returns whether there was room for them."""
        return not self._kept(work) or self._tables.reserve(work.node)

    def _schedule(self, work: PromptWork, segments: list[Segment], budget: int | None) -> int:
        """Append what is missing of a prompt, up to ``budget`` tokens; returns the number of tokens."""
        self._swept.append(work)
        used = 0
        kept = work.generating or self._kept(work)
        for node in work.node.path():
            self._tables.place(node, kept=kept)
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
        self._tables.extend(node, count)
        segment = prompt_segment(node, pages.scheduled, count, self._ends.get(node))
        pages.scheduled += count
        self._in_sweep.append(node)
        self._prompt_tokens_left -= max(0, pages.scheduled - node.num_seen)
        node.num_seen = max(node.num_seen, pages.scheduled)
        return segment


def _filled(work: PromptWork) -> bool:
    pages = work.node.pages
    return pages is not None and pages.scheduled == len(work.node.tokens)
