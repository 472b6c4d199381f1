"""Vector clocks: which work is certain to be over when other work begins, whatever the timing is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

MOST_ACCESSES = 300
"""Accesses that a region remembers; older ones are forgotten, which hides faults and makes none up."""
Spans = list[tuple[int, int]]
"""Ranges of bytes (begin, end) of a region, sorted and apart."""
Clock = dict["Agent", int]
"""By agent, how many of its steps are certain to be over."""


class Agent:
    """A host thread or a stream: it does one thing after the other."""

    def __init__(self, name: str, *, is_stream: bool) -> None:
        self.name, self.is_stream = name, is_stream
        self.known: Clock = {self: 0}

    def step(self) -> int:
        """Begin the next piece of work and return its number."""
        self.known[self] += 1
        return self.known[self]

    def learn(self, clock: Clock) -> None:
        """What a clock holds is over before anything that this agent does from now on."""
        for agent, count in clock.items():
            if self.known.get(agent, -1) < count:
                self.known[agent] = count

    def knows(self, access: Access) -> bool:
        """Whether an access is certain to be over before anything that this agent does from now on."""
        return access.agent is self or self.known.get(access.agent, -1) >= access.step

    def __repr__(self) -> str:
        return f"{'stream' if self.is_stream else 'thread'} {self.name}"


class Access(NamedTuple):
    """A read or write of a region.

    Attributes:
        agent: Who did it.
        step: Which of the agent's steps it was.
        writes: Whether it wrote.
        spans: The bytes.
        what: The operator, and the line of the package that called it.
    """

    agent: Agent
    step: int
    writes: bool
    spans: Spans
    what: str

    def __str__(self) -> str:
        return f"{self.agent} {'writes' if self.writes else 'reads'} in {self.what}"


class Region:
    """A piece of memory, and those accesses to it that later ones may collide with."""

    def __init__(self, kind: str, num_bytes: int, begin: int = 0) -> None:
        """Remember nothing yet.

        Args:
            kind: Name for reports.
            num_bytes: Its size.
            begin: Its address.
        """
        self.kind, self.num_bytes, self.begin = kind, num_bytes, begin
        self.accesses: list[Access] = []

    def add(self, new: Access) -> Iterator[Access]:
        """Remember an access; yields earlier ones to the same bytes that need not be over when it begins."""
        kept = []
        for old in self.accesses:
            ordered = new.agent.knows(old)
            if not ordered and (old.writes or new.writes) and overlap(old.spans, new.spans):
                yield old
            # Who is ordered behind the new access is then ordered behind the old one too.
            if not (ordered and (new.writes or not old.writes) and covers(new.spans, old.spans)):
                kept.append(old)
        self.accesses = [*kept[1 - MOST_ACCESSES :], new]


def overlap(a: Spans, b: Spans) -> bool:
    """Whether some byte is in both."""
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i][0] < b[j][1] and b[j][0] < a[i][1]:
            return True
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return False


def covers(outer: Spans, inner: Spans) -> bool:
    """Whether every byte of ``inner`` is in ``outer``."""
    i = 0
    for begin, end in inner:
        while i < len(outer) and outer[i][1] < end:
            i += 1
        if i == len(outer) or outer[i][0] > begin:
            return False
    return True


def joined(spans: Spans) -> Spans:
    """Sort ranges, and make one of those that touch."""
    found: Spans = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found
