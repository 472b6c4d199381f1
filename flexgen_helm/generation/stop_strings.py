"""Finding stop strings in a growing text."""

from __future__ import annotations

from collections.abc import Sequence


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the earliest of ``stops`` begins in ``text``, None if there is none."""
    found = [index for index in map(text.find, stops) if index >= 0]
    return min(found, default=None)


class StopFinder:
    """Looks for stop strings in a text that arrives in parts, searching only where a new one can be."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for ``stops``, none of them empty."""
        self._stops = tuple(stops)
        self._overlap = max(map(len, self._stops), default=1) - 1
        self._tail = ""
        self._num_dropped = 0

    def append(self, part: str) -> int | None:
        """Add text and return where the earliest stop string begins in the whole text, None if there is none yet."""
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
