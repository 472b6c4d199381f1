"""Spans: what a resource did, and when."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from flexgen_helm.types import Resource

ActivityKind = Literal[
    "plan",
    "record",
    "compute",
    "finish",
    "load_weights",
    "unpack_weights",
    "load_cache",
    "store_cache",
    "load_hidden",
    "store_hidden",
]
"""Kinds of work that a resource does: the kinds of operations, unpacking weights, and planning a sweep."""


class Activity(NamedTuple):
    """Work that a resource does: its kind, layer and row."""

    kind: ActivityKind
    where: str = ""
    """Layer, row, or "layer,row"."""

    def __str__(self) -> str:
        return f"{self.kind} {self.where}".rstrip()


class Span(NamedTuple):
    """An interval in which a resource was busy with one activity; begin and end are seconds since the run began."""

    resource: Resource
    activity: Activity
    begin: float
    end: float
    num_bytes: int = 0


def covered_seconds(intervals: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    """Return the length in seconds of the union of intervals, cut to [begin, end]."""
    covered, last = 0.0, begin
    for since, until in sorted(intervals):
        since, until = max(since, last), min(until, end)
        if until > since:
            covered += until - since
            last = until
    return covered
