"""Exact pages of a cache that seals pages: who has which, and for how long.

A query reads its own chunk of 128 tokens in the exact form and every earlier chunk sealed. So exact pages of a chunk are needed
as long as its last token is not computed, and while somebody may still branch from it:

* a page that is filled in the sweep in which its chunk ends is *transient*: every layer overwrites it;
* the chunk in which a node ends has pages of the node's own, as long as the node has pages;
* a completion has a ring of at most four pages, since it writes one token in a sweep;
* of all prompts at most one is cut by the end of a sweep. The chunk in which it is cut borrows its pages of a few spare ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS, PAGE_TOKENS, PagePool, num_pages, transient_page
from flexgen_helm.schedule.rows import Continuation
from flexgen_helm.schedule.tree import ExactPages, Node, NodePages, SequencePages

NUM_SPARE = 2 * CHUNK_PAGES
"""Pages for a prompt that is cut: those of the chunk that was cut last, and of the one that is cut next."""

SEQUENCE_PAGES = 2 * CHUNK_PAGES
"""Most pages of a prompt and one completion: those of the chunk in which the prompt ends, and a ring."""


class ExactTables:
    """Gives exact pages to nodes and completions, and takes them back."""

    def __init__(self, pool: PagePool, *, keep_all: bool) -> None:
        """Give nothing yet.

        Args:
            pool: Kept exact pages.
            keep_all: Whether every exact page is kept as long as its node, as orders other than the column order need.
        """
        self.pool, self._keep_all = pool, keep_all
        self.num_transient = 0
        """Transient pages handed out in this sweep."""
        self._spare: list[int] = []

    @property
    def num_used(self) -> int:
        """Pages that nodes and completions have."""
        return self.pool.num_used - len(self._spare)

    def resize(self, share: float) -> None:
        """Let the pool have a share of its bytes; nobody may have a page."""
        self.pool.release(self._spare)
        self._spare = []
        self.pool.resize(share)
        self.take_spare()

    def take_spare(self) -> None:
        """Take the spare pages."""
        self._spare = self.pool.allocate(min(NUM_SPARE, self.pool.num_free))

    def num_needed(self, nodes: Iterable[Node], ends: Iterable[tuple[int, Sequence[int]]]) -> int:
        """Return the number of pages that are reserved for some nodes and completions.

        Args:
            nodes: The nodes.
            ends: Number of tokens before completions, and the most tokens of each of them.
        """
        rings = sum(_ring(length, limit) for length, limits in ends for limit in limits)
        return sum(self._num_own(node.first_own, node.end) for node in nodes) + rings

    def num_alone(self, length: int, limits: Sequence[int]) -> int:
        """Return the number of pages that are reserved for a prompt that shares nothing, and for completions of it."""
        return self._num_own(0, length) + sum(_ring(length, limit) for limit in limits)

    def reserve(self, node: Node, pages: SequencePages, *, kept: bool) -> ExactPages:
        """Reserve the exact pages of a node that has these sealed ones."""
        first = node.start + (-node.start % PAGE_TOKENS if pages.in_tail else 0)
        return ExactPages(self.pool.allocate(self._num_own(first, node.end)) if kept else [])

    def reserve_ring(self, length: int, max_new_tokens: int) -> ExactPages:
        """Reserve the pages of a completion behind ``length`` tokens."""
        return ExactPages(self.pool.allocate(_ring(length, max_new_tokens)))

    def extend(self, node: Node, begin: int, end: int) -> None:
        """Give pages to the tokens at positions ``[begin, end)`` of a node, whose parent has its own already."""
        pages, exact = _exact(node)
        if begin == node.start:
            above = _exact(node.parent)[1].table if node.parent is not None else []
            shared, partial = divmod(begin, PAGE_TOKENS)
            exact.table = above[: shared + 1] if partial and pages.in_tail else above[:shared]
            if partial and not pages.in_tail:
                exact.table.append(self._page(node, shared, end))
                exact.copy = above[shared], exact.table[shared], partial
        for i in range(len(exact.table), num_pages(0, end)):
            exact.table.append(self._page(node, i, end))

    def complete(self, node: Node) -> None:
        """Take back what a node borrowed for chunks that are computed."""
        pages, exact = _exact(node)
        done = node.start + pages.scheduled
        self._spare += [page for last, page in exact.borrowed if last <= done]
        exact.borrowed = [(last, page) for last, page in exact.borrowed if last > done]

    def join(self, node: Node, continuation: Continuation) -> None:
        """Make the table of a completion's pages, once the node behind which it goes on has its own."""
        prefix, pages = _exact(node)[1], continuation.pages
        assert pages is not None
        assert pages.exact is not None
        last = node.end + continuation.max_new_tokens - 1
        if last == node.end:
            return
        shared, partial = divmod(node.end, PAGE_TOKENS)
        own, table = pages.exact.own, prefix.table[: shared + (partial > 0 and pages.in_tail)]
        table += [own[i % len(own)] for i in range(len(table), num_pages(0, last))]
        pages.exact.table = table
        if partial and not pages.in_tail:
            pages.exact.copy = prefix.table[shared], table[shared], partial

    def drop(self, exact: ExactPages) -> None:
        """Take all pages of a node or a completion back."""
        self.pool.release(exact.own)
        self._spare += [page for _, page in exact.borrowed]

    def _num_own(self, first: int, end: int) -> int:
        """Pages that a node reserves whose own pages begin and end at these absolute positions."""
        chunk = 0 if self._keep_all else end // CHUNK_TOKENS * CHUNK_TOKENS
        return num_pages(max(first, chunk), end)

    def _page(self, node: Node, i: int, end: int) -> int:
        """Take page i of a sequence, when a sweep computes a node up to position ``end``."""
        pages, exact = _exact(node)
        last = (i // CHUNK_PAGES + 1) * CHUNK_TOKENS
        if not pages.kept or (last <= end and not self._keep_all):
            self.num_transient += 1
            return transient_page(self.num_transient - 1)
        if last > node.end or self._keep_all:
            exact.num_given += 1
            return exact.own[exact.num_given - 1]
        exact.borrowed.append((last, self._spare.pop()))
        return exact.borrowed[-1][1]


def _ring(length: int, max_new_tokens: int) -> int:
    """Pages of a completion behind ``length`` tokens."""
    return min(CHUNK_PAGES, num_pages(length, length + max_new_tokens - 1))


def _exact(node: Node) -> tuple[NodePages, ExactPages]:
    """The pages of a node that has some."""
    assert node.pages is not None
    assert node.pages.exact is not None
    return node.pages, node.pages.exact
