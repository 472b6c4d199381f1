"""Waits of the device against spans whose causes are known, and against the definition: spans and waits fill the sweep."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.memory.spans.device_waits import LATE, Wait, device_waits, seconds_by_cause
from flexgen_helm.memory.spans.span import Activity, ActivityKind, Span, covered_seconds
from flexgen_helm.types import RESOURCES, Resource


def span(resource: Resource, kind: ActivityKind, where: str, begin: float, end: float) -> Span:
    return Span(resource, Activity(kind, where), begin, end)


def computed(where: str, begin: float, end: float) -> Span:
    return span("device", "compute", where, begin, end)


FIRST, SECOND = computed("3,0", 0, 1), computed("4,1", 5, 6)
"""Two computations, and between them four seconds without any."""


@pytest.mark.parametrize(
    ("needed", "cause", "what"),
    [
        (span("disk_read", "load_weights", "4", 0, 5), "weights", "weights of layer 4"),
        (span("unpack", "unpack_weights", "4", 2, 5), "weights", "weights of layer 4"),
        (span("host_to_device", "load_cache", "4", -1, 5), "cache", "K/V of layer 4"),
        (span("device_to_host", "store_cache", "4", 2, 5), "cache", "K/V of layer 4"),
        (span("host_to_device", "load_hidden", "1", 0, 5), "hidden", "hidden states of row 1"),
        (span("disk_write", "store_hidden", "1", 0, 5), "hidden", "hidden states of row 1"),
        (span("cpu_attention", "compute", "4", 1, 5), "cpu_attention", "attention of layer 4 on the CPU"),
    ],
)
def test_what_the_next_computation_needs_is_the_cause(needed: Span, cause: str, what: str) -> None:
    """Other layers and rows, and what ended earlier, are not."""
    others = [
        span("disk_read", "load_weights", "5", 0, 5),
        span("host_to_device", "load_cache", "3", 0, 5),
        span("host_to_device", "load_hidden", "4", 0, 5),
        span("cpu_attention", "compute", "1", 0, 5),
        span("host_to_device", "load_weights", "4", 0, 4.5),
        span("host_to_device", "load_cache", "4", 4.5, 9),  # of the next row: this one has begun before it ends
    ]
    assert device_waits([FIRST, SECOND, needed, *others], 0, 6) == [Wait(cause, what, 1, 5)]  # type: ignore[arg-type]


def test_behind_the_end_of_what_was_needed_the_host_was_not_ready() -> None:
    waits = device_waits([FIRST, SECOND, span("disk_read", "load_weights", "4", 0, 3)], 0, 6)
    assert waits == [Wait("weights", "weights of layer 4", 1, 3), Wait("host", "host", 3, 5)]
    assert device_waits([FIRST, SECOND], -1, 8) == [
        Wait("host", "host", -1, 0),
        Wait("host", "host", 1, 5),
        Wait("host", "host", 6, 8),
    ]
    assert seconds_by_cause(waits) == {"weights": 2, "host": 2}


def test_an_end_that_is_recorded_a_little_late_counts() -> None:
    """The thread that computes may go on before the one that read has noted its end."""
    late = span("disk_read", "load_weights", "4", 0, 5 + LATE / 2)
    assert device_waits([FIRST, SECOND, late], 0, 6) == [Wait("weights", "weights of layer 4", 1, 5)]
    later = span("disk_read", "load_weights", "4", 0, 5 + 2 * LATE)
    assert device_waits([FIRST, SECOND, later], 0, 6) == [Wait("host", "host", 1, 5)]


def test_the_head_has_the_number_after_the_last_layer() -> None:
    finish = span("device", "finish", "", 5, 6)
    loads = [span("disk_read", "load_weights", "3", 0, 5), span("host_to_device", "load_weights", "4", 0, 5)]
    assert device_waits([FIRST, finish, *loads], 0, 6) == [Wait("weights", "weights of the output head", 1, 5)]


TIMES = st.integers(0, 30)
SPANS = st.builds(
    lambda resource, kind, where, a, b: span(resource, kind, where, min(a, b), max(a, b)),
    st.sampled_from(RESOURCES),
    st.sampled_from(["compute", "load_weights", "load_cache", "load_hidden"]),
    st.sampled_from(["0", "1", "0,1", "1,0"]),
    TIMES,
    TIMES,
)


@settings(derandomize=True, max_examples=80)
@given(spans=st.lists(SPANS, max_size=12), window=st.tuples(TIMES, TIMES).map(sorted))
def test_computing_and_waiting_fill_a_sweep(spans: list[Span], window: list[int]) -> None:
    begin, end = window
    waits = device_waits(spans, begin, end)
    computing = [(span.begin, span.end) for span in spans if span.resource == "device"]
    assert sum(seconds_by_cause(waits).values()) + covered_seconds(computing, begin, end) == end - begin
    together = [*computing, *((wait.begin, wait.end) for wait in waits)]
    assert covered_seconds(together, begin, end) == end - begin
    assert all(begin <= wait.begin < wait.end <= end for wait in waits)
