"""Find stop strings in a text that grows."""

from __future__ import annotations

from collections.abc import Sequence


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return the index in ``text`` where the first of ``stops`` begins, or None if it contains none of them."""
    found = [index for index in map(text.find, stops) if index >= 0]
    return min(found, default=None)


class StopFinder:
    """Finds stop strings in a text that arrives in parts. Each part is searched only where a new one can begin."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Start with an empty text.

        Args:
            stops: The stop strings, none of them empty.
        """
        self._stops = tuple(stops)
        self._overlap = max(map(len, self._stops), default=1) - 1
        self._tail = ""
        self._num_dropped = 0

    def append(self, part: str) -> int | None:
        """Add a part. Return the index in the whole text where the first stop string begins, or None if there is none yet."""
        if not self._stops or not part:
            return None
        window = self._tail + part
        index = find_stop(window, self._stops)
        if index is not None:
            return self._num_dropped + index
        kept = min(self._overlap, len(window))
        self._num_dropped += len(window) - kept
        self._tail = window[len(window) - kept :]
        return None
