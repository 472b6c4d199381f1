"""Traces against what the trace event format asks for: complete events that nest in their row, and named rows."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen_helm.errors import FlexGenError
from flexgen_helm.memory.spans.span import Activity, Span, covered_seconds
from flexgen_helm.run_stats import SweepStats
from flexgen_helm.runtime.trace import write_trace
from flexgen_helm.types import RESOURCES

SWEEPS = [
    SweepStats(0.0, 2.0, 512, 0, 4, {"disk_read": 10}, {"disk_read": 10}, {"disk_read": 1.5, "device": 0.5}),
    SweepStats(2.0, 1.0, 0, 4, 4, {}, {}, {"device": 0.25}),
]
TIMES = st.floats(0, 3, allow_nan=False)
SPANS = st.lists(
    st.builds(
        lambda resource, a, b: Span(resource, Activity("compute", "1"), min(a, b), max(a, b), 7),
        st.sampled_from(RESOURCES),
        TIMES,
        TIMES,
    ),
    max_size=12,
)


def events_of(path: Path, spans: list[Span]) -> list[dict[str, Any]]:
    write_trace(path, spans, SWEEPS)
    trace = json.loads(path.read_text())
    events: list[dict[str, Any]] = trace["traceEvents"]
    return events


@settings(derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spans=SPANS)
def test_every_span_stands_in_a_row_of_its_resource_and_none_overlap_there(spans: list[Span], tmp_path: Path) -> None:
    events = events_of(tmp_path / "trace.json", spans)
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    complete = [event for event in events if event["ph"] == "X"]
    waits = [event for event in complete if event["cat"] == "device_waits"]
    assert len(complete) == len(spans) + len(SWEEPS) + len(waits)
    device = [span for span in spans if span.resource == "device"]
    computing = covered_seconds([(span.begin, span.end) for span in device], 0, 3)
    if spans:
        assert sum(event["dur"] for event in waits) == pytest.approx((3 - computing) * 1e6)
    assert all({"ph", "name", "pid", "tid"} <= event.keys() for event in events)
    for event in complete:
        assert event["dur"] >= 0
        assert event["cat"] == "sweep" or names[event["tid"]].startswith(event["cat"].replace("_", " "))
    for a, b in combinations(complete, 2):
        if a["tid"] == b["tid"]:
            first, second = sorted([a, b], key=lambda event: (event["ts"], event["dur"]))
            assert first["ts"] + first["dur"] <= second["ts"] + 1e-6  # a picosecond, of floats


def test_times_are_microseconds_and_sweeps_say_what_bound_them(tmp_path: Path) -> None:
    events = events_of(tmp_path / "trace.json", [Span("disk_read", Activity("load_weights", "3"), 0.25, 1.75, 10)])
    read = next(event for event in events if event["name"] == "load_weights 3")
    assert (read["ts"], read["dur"], read["args"]) == (250_000, 1_500_000, {"bytes": 10})
    sweeps = [event for event in events if event.get("cat") == "sweep"]
    assert [(event["ts"], event["dur"]) for event in sweeps] == [(0, 2e6), (2e6, 1e6)]
    assert [event["args"]["bound by"] for event in sweeps] == ["disk read", "device"]


def test_gaps_of_the_device_are_named_in_the_sweep_in_which_they_are(tmp_path: Path) -> None:
    """Weights of layer 1 come during the first sweep; K and V of layer 0 come across its end."""
    spans = [
        Span("device", Activity("compute", "0,0"), 0, 0.5),
        Span("disk_read", Activity("load_weights", "1"), 0.25, 1.5),
        Span("device", Activity("compute", "1,0"), 1.5, 2),
        Span("host_to_device", Activity("load_cache", "0"), 1.75, 2.5),
        Span("device", Activity("compute", "0,0"), 2.5, 3),
    ]
    waits = [event for event in events_of(tmp_path / "trace.json", spans) if event.get("cat") == "device_waits"]
    assert [(event["name"], event["args"]["cause"], event["ts"], event["dur"]) for event in waits] == [
        ("weights of layer 1", "weights", 0.5e6, 1e6),
        ("K/V of layer 0", "cache", 2e6, 0.5e6),
    ]


def test_a_folder_that_is_not_there_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(FlexGenError, match="cannot be written"):
        write_trace(tmp_path / "none" / "trace.json", [], SWEEPS)
