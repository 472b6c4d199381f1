"""Accounting of K/V pages: which are free. The tensors behind them are in `flexgen_helm.memory.cache`."""

from __future__ import annotations

from flexgen_helm.errors import OutOfSpace

PAGE_TOKENS = 32
"""Tokens in a page, by absolute position (docs/architecture.md)."""


def num_pages(start: int, end: int) -> int:
    """Number of pages that positions ``[start, end)`` touch."""
    return 0 if end <= start else (end - 1) // PAGE_TOKENS - start // PAGE_TOKENS + 1


class PagePool:
    """Hands out page numbers below a capacity, lowest first as far as the pool has grown."""

    def __init__(self, capacity: int, *, page_bytes: int = 1) -> None:
        self.capacity, self.page_bytes = capacity, page_bytes
        self._free: list[int] = []
        self.high_water = 0
        """Pages that storage must have: one more than the highest number handed out so far."""

    @property
    def num_free(self) -> int:
        """Pages that may still be taken."""
        return self.capacity - self.high_water + len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that are taken."""
        return self.high_water - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages.

        Raises:
            OutOfSpace: If fewer are free; admission asks `num_free` first, so this is not reached from a user's job.
        """
        if count > self.num_free:
            raise OutOfSpace(f"{count} K/V pages were asked for, {self.num_free} of {self.capacity} are free")
        reused = [self._free.pop() for _ in range(min(count, len(self._free)))]
        fresh = range(self.high_water, self.high_water + count - len(reused))
        self.high_water = fresh.stop
        return reused + list(fresh)

    def release(self, pages: list[int]) -> None:
        """Give pages back."""
        self._free.extend(reversed(pages))
