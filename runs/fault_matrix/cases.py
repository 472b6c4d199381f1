"""The cases of each part, by their names: all that is known of them before a part is imported, which takes ten seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice

from flexgen_helm.runs.fault_matrix.outcomes import Case

COMMAND_S = 600.0
"""A command hangs if it has not ended by then."""
REQUESTS, BATCH_S = 250, 900.0
"""Requests of a batch, and its time."""
KILLS, KILL_S = 20, 90.0
"""Kills of a batch, and the time of each."""
OF_FITS = 5
"""Every fifth kill meets a fit."""
FILE_S = 120.0
SUBJECTS = (
    *("journal", "cache", "slabs", "suite", "config", "baseline", "compressed slabs", "shards", "statistics", "tokenizer"),
    *("journal", "records", "suite", "cache", "slabs", "decisions", "journal", "shards", "baseline", "tokenizer"),
)
"""Damaged in turn."""
TWINS = ("same_runs", "some_of_the_runs")
CLOCKS = ("back_in_a_run", "back_between_runs", "forward_in_a_run", "files_of_the_future", "files_of_1970")


def requests(count: int) -> list[Case]:
    """Return batches that hold so many requests together."""
    return list(_batches("batch", count, REQUESTS, BATCH_S, 0))


def kills(count: int) -> list[Case]:
    """Return batches of kills that are so many together."""
    fits = count // OF_FITS
    batches = (("suite", count - fits), ("fit", fits))
    return [case for name, number in batches for case in _batches(name, number, KILLS, COMMAND_S * 3, KILL_S)]


def files(count: int) -> list[Case]:
    """Return so many files, each of a subject."""
    return _in_turn([subject.replace(" ", "_") for subject in SUBJECTS], count, FILE_S)


def disks(count: int) -> list[Case]:
    """Return so many sizes, as shares of what the whole suite takes."""
    return [Case(f"disk {(number + 0.5) / count:.3f}", COMMAND_S * 3) for number in range(count)]


def twins(count: int) -> list[Case]:
    """Return so many pairs of commands."""
    return _in_turn(TWINS, count, COMMAND_S * 4)


def clock(count: int) -> list[Case]:
    """Return so many changes of the clock."""
    return _in_turn(CLOCKS, count, COMMAND_S * 3)


def _in_turn(kinds: Sequence[str], count: int, seconds: float) -> list[Case]:
    return [Case(f"{kind} {number}", seconds) for number, kind in enumerate(islice(cycle(kinds), count))]


def _batches(name: str, count: int, most: int, seconds: float, seconds_each: float) -> Iterator[Case]:
    for number, begin in enumerate(range(0, count, most)):
        size = min(most, count - begin)
        yield Case(f"{name} {number} {size}", seconds + seconds_each * size)
