"""What the device waited for between two computations, found from the spans of a sweep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from flexgen_helm.memory.spans.span import Activity, Span

WaitCause = Literal["weights", "cache", "hidden", "cpu_attention", "host"]
"""Weights, K/V or hidden states on their way, attention on the CPU; or nothing of these: the host was not ready."""
LATE = 5e-3
"""Seconds by which a span's end may be recorded too late: Python's threads take turns of 5 ms, and a GPU has its own clock."""
_Work = tuple[str, str]
"""Kind and place of an activity; attention on the CPU has a kind of its own."""


class Wait(NamedTuple):
    """An interval in which the device computed nothing; begin and end are seconds since the run began."""

    cause: WaitCause
    what: str
    """What was waited for, in words."""
    begin: float
    end: float


class _Need(NamedTuple):
    """Something that a computation may wait for."""

    cause: WaitCause
    what: str
    works: tuple[_Work, ...]


def device_waits(spans: Iterable[Span], begin: float, end: float) -> list[Wait]:
    """Return the gaps between the device's spans in a sweep, in order. They and the spans add up to the sweep's time.

    A gap belongs to the transfer, or the attention on the CPU, that the next computation needs and that ended last before it
    began. From that end to the begin of the computation the host was not ready; so it was where there is no such transfer.

    Args:
        spans: Spans that were busy in the sweep, of all resources.
        begin: When the sweep began, in seconds since the run began.
        end: When it ended.
    """
    computing: list[Span] = []
    works: defaultdict[_Work, list[Span]] = defaultdict(list)
    for span in spans:
        if span.resource == "device":
            computing.append(span)
        else:
            works[_work(span)].append(span)
    head = 1 + max((_layer(span.activity) for span in computing), default=-1)
    waits, last = list[Wait](), begin
    for span in sorted(computing, key=lambda span: span.begin):
        if last < min(span.begin, end):
            waits += _explained(last, min(span.begin, end), _needs(span.activity, head), works)
        last = max(last, span.end)
    return [*waits, Wait("host", "host", last, end)] if last < end else waits


def seconds_by_cause(waits: Iterable[Wait]) -> dict[str, float]:
    """Return the seconds of waits by their cause."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for wait in waits:
        seconds[wait.cause] += wait.end - wait.begin
    return dict(seconds)


def _explained(begin: float, end: float, needs: list[_Need], works: dict[_Work, list[Span]]) -> Iterator[Wait]:
    """Yield one gap: up to the end of what ended last, and from there to the gap's end."""
    ends = [
        (abs(end - span.end), need, min(span.end, end))
        for need in needs
        for work in need.works
        for span in works.get(work, ())
        if span.begin < end and begin < span.end <= end + LATE
    ]
    since = begin
    if ends:
        _, need, since = min(ends)
        yield Wait(need.cause, need.what, begin, since)
    if since < end:
        yield Wait("host", "host", since, end)


def _needs(activity: Activity, head: int) -> list[_Need]:
    """Return what a computation may have waited for."""
    if activity.kind != "compute":
        return [_Need("weights", "weights of the output head", _loads(str(head)))]
    j, _, k = activity.where.partition(",")
    return [
        _Need("weights", f"weights of layer {j}", _loads(j)),
        _Need("cache", f"K/V of layer {j}", (("load_cache", j), ("store_cache", j))),
        _Need("hidden", f"hidden states of row {k}", (("load_hidden", k), ("store_hidden", k))),
        _Need("cpu_attention", f"attention of layer {j} on the CPU", (("cpu_attention", j),)),
    ]


def _loads(unit: str) -> tuple[_Work, ...]:
    return ("load_weights", unit), ("unpack_weights", unit)


def _work(span: Span) -> _Work:
    return "cpu_attention" if span.resource == "cpu_attention" else span.activity.kind, span.activity.where


def _layer(activity: Activity) -> int:
    return int(activity.where.partition(",")[0]) if activity.kind == "compute" else -1
