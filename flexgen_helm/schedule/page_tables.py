"""Page tables: the pages that hold the K and V of nodes and completions, given and taken back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flexgen_helm.kv_cache.pages import PAGE_TOKENS, Form, PagePool, PageStorage, num_pages, transient_page
from flexgen_helm.schedule.exact_tables import NUM_SPARE, ExactTables
from flexgen_helm.schedule.rows import Continuation
from flexgen_helm.schedule.tree import Node, NodePages, SequencePages
from flexgen_helm.schedule.work import PromptWork


class PageTables:
    """Gives pages to nodes and completions, and takes them back.

    Whole pages of a prefix are shared. In the page where sequences part, the first goes on behind the prefix and the others
    copy its beginning into a page of their own; so a prompt alone never needs more pages than its length.
    """

    def __init__(self, pools: Mapping[Form, PagePool], *, keep_all: bool = False, divided: bool = False) -> None:
        """Give nothing yet.

        Args:
            pools: Kept pages by form. If there are sealed ones, sequences have a table of both forms; either form may take all
                bytes of the other.
            keep_all: See `flexgen_helm.schedule.exact_tables.ExactTables`.
            divided: Whether the bytes of the forms are divided for good, since others have pages of the same storage.
        """
        self._exact = ExactTables(pools["exact"], keep_all=keep_all) if "sealed" in pools else None
        self._form: Form = "exact" if self._exact is None else "sealed"
        self._pool = pools[self._form]
        self._num_transient = 0
        self._divided = divided
        if divided and self._exact is not None:
            self._exact.take_spare()

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all kept pages."""
        if self._divided and self._exact is not None:
            return self._pool.capacity * self._pool.page_bytes + self._exact.pool.capacity * self._exact.pool.page_bytes
        return sum(self._pool.most) * self._pool.page_bytes

    def bytes_needed(self, length: int, limits: Sequence[int]) -> int:
        """Return the bytes of the kept pages of a prompt that shares nothing, with completions of at most ``limits`` tokens."""
        pages = num_pages(0, length) + sum(continuation_pages(length, limit) for limit in limits)
        needed = pages * self._pool.page_bytes
        if self._exact is None:
            return needed
        return needed + self._exact.num_alone(length, limits) * self._exact.pool.page_bytes + self._spare_bytes

    def balance(self, works: Iterable[PromptWork]) -> None:
        """Divide the bytes between sealed and exact pages as some work needs them; nothing is done while pages are taken."""
        if self._exact is None or self._divided or not self.capacity_bytes or self._pool.num_used or self._exact.num_used:
            return
        works = list(works)
        nodes = list({node: None for work in works for node in work.node.path()})
        sealed = sum(_own_pages(node) for node in nodes)
        sealed += sum(continuation_pages(work.node.end, limit) for work in works for limit in work.limits)
        exact = self._exact.num_needed(nodes, [(work.node.end, work.limits) for work in works])
        exact_bytes = exact * self._exact.pool.page_bytes
        needed = max(1, exact_bytes + sealed * self._pool.page_bytes)
        left = max(0, self.capacity_bytes - self._spare_bytes)
        beside = self._spare_bytes - _num_tiers(self._pool) * self._pool.page_bytes
        share = min(1.0, (beside + left * exact_bytes / needed) / self.capacity_bytes)
        self._exact.resize(share)
        self._pool.resize(1 - share)

    def begin_sweep(self) -> None:
        """Forget the transient pages of the last sweep."""
        self._num_transient = 0
        if self._exact is not None:
            self._exact.num_transient = 0

    def storage(self) -> dict[Form, PageStorage]:
        """Return the storage that must be there for the pages that were given."""
        found: dict[Form, PageStorage] = {self._form: PageStorage(self._pool.high_water, self._num_transient)}
        if self._exact is not None:
            found["exact"] = PageStorage(self._exact.pool.high_water, self._exact.num_transient)
        return found

    def place(self, node: Node, *, kept: bool) -> None:
        """Give a node its pages, if it has none; its parent has them already."""
        if node.pages is None:
            above = node.parent.pages if node.parent is not None else None
            pages = self._continue_behind(above, node.start, node.end, kept=kept)
            exact = None if self._exact is None else self._exact.reserve(node, pages, kept=kept)
            node.pages = NodePages(pages.own, pages.table, pages.copy, pages.in_tail, exact=exact, kept=kept)

    def extend(self, node: Node, count: int) -> None:
        """Give exact pages to the next tokens of a node, which a sweep will compute."""
        assert node.pages is not None
        if self._exact is not None:
            begin = node.start + node.pages.scheduled
            self._exact.extend(node, begin, begin + count)

    def complete(self, node: Node) -> None:
        """Take exact pages back that nobody needs once the tokens of a node that were scheduled are computed."""
        if self._exact is not None and node.pages is not None:
            self._exact.complete(node)

    def join(self, node: Node, continuations: Iterable[Continuation]) -> None:
        """Give completions their exact pages, now that the node behind which they go on is computed."""
        if self._exact is not None:
            for continuation in continuations:
                self._exact.join(node, continuation)

    def reserve(self, node: Node, continuations: Sequence[Continuation] = ()) -> bool:
        """Give the prompt that ends at a node its kept pages, and completions of it theirs.

        Returns:
            False, and nothing is given, if fewer pages are free than they need.
        """
        path = [upper for upper in node.path() if upper.pages is None]
        limits = [continuation.max_new_tokens for continuation in continuations]
        needed = sum(map(_own_pages, path)) + sum(continuation_pages(node.end, limit) for limit in limits)
        if needed > self._pool.num_free:
            return False
        if self._exact is not None and self._exact.num_needed(path, [(node.end, limits)]) > self._exact.pool.num_free:
            return False
        for upper in path:
            self.place(upper, kept=True)
        for continuation in continuations:
            last = node.end + continuation.max_new_tokens - 1
            continuation.pages = self._continue_behind(node.pages, node.end, last, kept=True)
            if self._exact is not None:
                continuation.pages.exact = self._exact.reserve_ring(node.end, continuation.max_new_tokens)
        return True

    def drop(self, node: Node) -> None:
        """Take a node's pages back; those of its children are gone already or go with it."""
        if node.pages is None:
            return
        if node.pages.kept:
            self._release(node.pages)
        if node.pages.in_tail and node.parent is not None and node.parent.pages is not None:
            node.parent.pages.tail_free = True
        node.pages = None

    def drop_continuation(self, continuation: Continuation, node: Node) -> None:
        """Take a completion's pages back, if it has any."""
        if continuation.pages is None:
            return
        self._release(continuation.pages)
        if continuation.pages.in_tail and node.pages is not None:
            node.pages.tail_free = True
        continuation.pages = None

    def drop_prompt(self, node: Node, continuations: Sequence[Continuation] = ()) -> None:
        """Take back the pages of the prompt that ends at a node, and those of completions of it."""
        for upper in node.path():
            self.drop(upper)
        for continuation in continuations:
            self.drop_continuation(continuation, node)

    @property
    def _spare_bytes(self) -> int:
        """Bytes that no work may count on: exact pages for a prompt that is cut, and what whole pages leave unused.

        Whole exact pages leave bytes of a tier, and of their share of it; sealed ones are what a tier's bytes are counted in.
        """
        assert self._exact is not None
        tiers = _num_tiers(self._pool)
        return (NUM_SPARE + 2 * tiers) * self._exact.pool.page_bytes + tiers * self._pool.page_bytes

    def _release(self, pages: SequencePages) -> None:
        self._pool.release(pages.own)
        if self._exact is not None and pages.exact is not None:
            self._exact.drop(pages.exact)

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
        self._num_transient += count
        return [transient_page(index) for index in range(self._num_transient - count, self._num_transient)]


def continuation_pages(length: int, max_new_tokens: int) -> int:
    """Pages of a completion's own behind a prompt of ``length`` tokens; its last token is never attended to."""
    return num_pages(length, length + max_new_tokens - 1)


def _own_pages(node: Node) -> int:
    """Pages that a node will need: one less where it can go on in its parent's last page."""
    return num_pages(node.first_own, node.end)


def _num_tiers(pool: PagePool) -> int:
    return sum(count > 0 for count in pool.most)
