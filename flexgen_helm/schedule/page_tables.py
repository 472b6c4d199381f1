"""Page tables: the pages that hold the K and V of nodes and completions, given and taken back."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_helm.kv_cache.pages import PAGE_TOKENS, PagePool, num_pages
from flexgen_helm.schedule.rows import Continuation
from flexgen_helm.schedule.tree import Node, NodePages, SequencePages


class PageTables:
    """Gives pages to nodes and completions, and takes them back.

    Whole pages of a prefix are shared. In the page where sequences part, the first goes on behind the prefix and the others
    copy its beginning into a page of their own; so a prompt alone never needs more pages than its length.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.num_transient = 0
        """Transient pages handed out in this sweep."""

    def place(self, node: Node, *, kept: bool) -> None:
        """Give a node its pages, if it has none; its parent has them already."""
        if node.pages is None:
            above = node.parent.pages if node.parent is not None else None
            pages = self._continue_behind(above, node.start, node.end, kept=kept)
            node.pages = NodePages(pages.own, pages.table, pages.copy, pages.in_tail, kept=kept)

    def reserve(self, node: Node, continuations: Sequence[Continuation] = ()) -> bool:
        """Give the prompt that ends at a node its kept pages, and completions of it theirs.

        Returns:
            False, and nothing is given, if fewer pages are free than they need.
        """
        path = node.path()
        needed = sum(_own_pages(upper) for upper in path if upper.pages is None)
        needed += sum(continuation_pages(node.end, continuation.max_new_tokens) for continuation in continuations)
        if needed > self._pool.num_free:
            return False
        for upper in path:
            self.place(upper, kept=True)
        for continuation in continuations:
            last = node.end + continuation.max_new_tokens - 1
            continuation.pages = self._continue_behind(node.pages, node.end, last, kept=True)
        return True

    def drop(self, node: Node) -> None:
        """Take a node's pages back; those of its children are gone already or go with it."""
        if node.pages is None:
            return
        if node.pages.kept:
            self._pool.release(node.pages.own)
        if node.pages.in_tail and node.parent is not None and node.parent.pages is not None:
            node.parent.pages.tail_free = True
        node.pages = None

    def drop_continuation(self, continuation: Continuation, node: Node) -> None:
        """Take a completion's pages back, if it has any."""
        if continuation.pages is None:
            return
        self._pool.release(continuation.pages.own)
        if continuation.pages.in_tail and node.pages is not None:
            node.pages.tail_free = True
        continuation.pages = None

    def drop_prompt(self, node: Node, continuations: Sequence[Continuation] = ()) -> None:
        """Take back the pages of the prompt that ends at a node, and those of completions of it."""
        for upper in node.path():
            self.drop(upper)
        for continuation in continuations:
            self.drop_continuation(continuation, node)

    def _continue_behind(self, above: NodePages | None, start: int, end: int, *, kept: bool) -> SequencePages:
        """Pages for positions ``[start, end)`` behind a node."""
        shared, partial = divmod(start, PAGE_TOKENS)
        if above is None or not partial or end <= start:
            own = self._allocate(num_pages(start, end), kept)
            return SequencePages(own, (above.table[:shared] if above else []) + own, None, False)
        if above.tail_free:
            above.tail_free = False
            own = self._allocate(num_pages(start + PAGE_TOKENS - partial, end), kept)
            return SequencePages(own, above.table[: shared + 1] + own, None, True)
        own = self._allocate(num_pages(start, end), kept)
        return SequencePages(own, above.table[:shared] + own, (above.table[shared], own[0], partial), False)

    def _allocate(self, count: int, kept: bool) -> list[int]:
        if kept:
            return self._pool.allocate(count)
        self.num_transient += count
        return list(range(self.num_transient - count, self.num_transient))


def continuation_pages(length: int, max_new_tokens: int) -> int:
    """Pages of a completion's own behind a prompt of ``length`` tokens; its last token is never attended to."""
    return num_pages(length, length + max_new_tokens - 1)


def _own_pages(node: Node) -> int:
    """Pages that a node will need: one less where it can go on in its parent's last page."""
    above = node.parent.pages if node.parent is not None else None
    into = -node.start % PAGE_TOKENS if above is None or above.tail_free else 0
    return num_pages(node.start + into, node.end)
