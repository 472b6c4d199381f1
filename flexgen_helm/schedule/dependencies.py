"""When an operation may begin: what must have ended before it, as plain data.

The overlapped executor obeys these rules, and a simulator of time follows them.
"""

from __future__ import annotations

MOST_SUSPENDED = 1
"""Layer calls that are suspended beside the one that runs: each holds its row's activations, and the CPU attends for one."""


def rows_at_once(*, suspends: bool) -> int:
    """Rows whose pages are brought at a time: the one that is computed, the next, and those that are suspended."""
    return 2 + MOST_SUSPENDED * suspends
