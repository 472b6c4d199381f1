"""What the meter says, against spans on a clock of the test's own and unions found by sampling."""

from __future__ import annotations

import contextlib
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.spans.span import Activity, covered_seconds
from flexgen_helm.run_stats import RunStats

CPU = torch.device("cpu")
INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda pair: (min(pair), max(pair))), max_size=8)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@settings(derandomize=True, max_examples=60)
@given(intervals=INTERVALS, window=st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted))
def test_union_is_what_sampling_finds(intervals: list[tuple[int, int]], window: list[int]) -> None:
    begin, end = window
    middles = [t + 0.5 for t in range(begin, end)]
    expected = sum(any(since < t < until for since, until in intervals) for t in middles)
    assert covered_seconds(intervals, begin, end) == expected


def test_sweeps_share_out_what_spans_them() -> None:
    """A read of four seconds, of which three are in the first sweep, beside computation."""
    clock = Clock()
    meter = Meter(CPU, clock)
    meter.begin_run()
    read = meter.span("disk_read", Activity("load_weights", "0"), num_bytes=80)
    with meter.span("device", Activity("compute", "0,0")):
        clock.seconds += 1
        read.__enter__()
    with meter.span("device", Activity("compute", "0,1")):
        clock.seconds += 2
    clock.seconds += 1
    meter.end_sweep(prompt_tokens=7, decode_tokens=0, generated_tokens=1)
    clock.seconds += 1
    read.__exit__(None, None, None)
    with meter.span("disk_read", Activity("load_cache", "0,0"), num_bytes=5):
        clock.seconds += 2
    meter.end_sweep(prompt_tokens=0, decode_tokens=3, generated_tokens=3)
    stats = RunStats()
    meter.end_run(stats)
    first, second = stats.per_sweep
    assert (first.begin, first.seconds, second.begin, second.seconds) == (0, 4, 4, 3)
    assert (first.prompt_tokens, first.generated_tokens, second.prompt_tokens, second.generated_tokens) == (7, 1, 0, 3)
    assert first.busy_seconds == {"device": 3, "disk_read": 3}
    assert second.busy_seconds == {"disk_read": 3}
    assert first.bytes_moved == first.weight_bytes_moved == {}
    assert (second.bytes_moved, second.weight_bytes_moved) == ({"disk_read": 85}, {"disk_read": 80})
    assert (stats.bytes_moved, stats.busy_seconds) == ({"disk_read": 85}, {"device": 3, "disk_read": 6})
    assert second.bound_by == "disk_read"
    assert stats.bytes_saved == {}


def test_what_a_computation_waits_for_is_no_work_of_the_device() -> None:
    """A layer of two seconds in two parts, between which it waits for three; before it the host needs one."""
    clock = Clock()
    meter, stats = Meter(CPU, clock), RunStats()
    meter.spans = []
    with meter.waiting():  # nothing is computed
        pass
    meter.begin_run()
    clock.seconds += 1
    with meter.span("device", Activity("compute", "2,0")):
        clock.seconds += 1.5
        with contextlib.suppress(ValueError), meter.waiting(), meter.span("host_to_device", Activity("load_cache", "2")):
            clock.seconds += 3
            raise ValueError
        clock.seconds += 0.5
    meter.end_sweep(0, 1, 1)
    with meter.span("device", Activity("compute", "0,0")):
        clock.seconds += 1
    clock.seconds += 1
    meter.end_sweep(0, 1, 1)
    meter.end_run(stats)
    assert [str(span.activity) for span in meter.spans if span.resource == "device"] == ["compute 2,0"] * 2 + ["compute 0,0"]
    assert stats.busy_seconds == {"device": 3, "host_to_device": 3}
    assert [sweep.device_wait_seconds for sweep in stats.per_sweep] == [{"host": 1, "cache": 3}, {"host": 1}]
    assert stats.device_wait_seconds == {"host": 2, "cache": 3}


def test_bytes_that_were_saved_are_told_where_a_link_is_used() -> None:
    meter, stats = Meter(CPU), RunStats()
    meter.save("disk_read", 7)  # of no run
    meter.begin_run()
    meter.save("host_to_device", 0)
    meter.save("disk_read", 0)
    meter.save("device_to_host", 60)
    meter.save("device_to_host", -20)
    meter.add("disk_read", Activity("load_cache", "0"), meter.now(), meter.now(), 5)
    meter.end_sweep(0, 0, 0)
    meter.end_run(stats)
    assert stats.bytes_saved == {"device_to_host": 40, "disk_read": 0}


def test_what_was_done_elsewhere_counts_once_where_it_overlaps() -> None:
    clock = Clock()
    meter = Meter(CPU, clock)
    meter.begin_run()
    clock.seconds += 10
    meter.add("disk_read", Activity("load_weights", "1"), 101, 105, 10)
    meter.add("disk_read", Activity("load_weights", "2"), 103, 107, 10)
    meter.end_sweep(0, 0, 0)
    stats = RunStats()
    meter.end_run(stats)
    assert (stats.busy_seconds, stats.bytes_moved) == ({"disk_read": 6}, {"disk_read": 20})


def test_an_error_ends_a_span_and_runs_do_not_mix() -> None:
    clock = Clock()
    meter = Meter(CPU, clock)
    with meter.span("device", Activity("compute", "0,0")):  # no run: not kept
        clock.seconds += 1
    meter.end_sweep(1, 0, 1)
    meter.spans = []
    for _ in range(2):
        meter.begin_run()
        with contextlib.suppress(ValueError), meter.span("device", Activity("compute", "0,0")):
            clock.seconds += 2
            raise ValueError
        meter.end_sweep(1, 0, 1)
        stats = RunStats()
        meter.end_run(stats)
        assert len(stats.per_sweep) == len(meter.spans) == 1
        assert stats.busy_seconds == {"device": 2}


def test_peaks_are_those_of_sums_and_of_this_run() -> None:
    meter = Meter(CPU)
    meter.hold("host", "weights", 100)
    meter.hold("host", "cache", 50)
    meter.hold("host", "cache", 0)
    meter.begin_run()
    stats = RunStats()
    meter.hold("host", "hidden", 20)
    meter.hold("disk", "cache", 5)
    meter.hold("host", "hidden", 0)
    meter.end_run(stats)
    assert stats.tier_peak_bytes == {"host": 120, "disk": 5}


def test_threads_lose_nothing() -> None:
    meter = Meter(CPU)
    meter.spans = []
    meter.begin_run()
    sweeping = threading.Event()

    def work() -> None:
        for i in range(500):
            with meter.span("host_to_device", Activity("load_cache", f"{i},0"), num_bytes=1):
                pass

    def sweep() -> None:
        while not sweeping.is_set():
            meter.end_sweep(0, 0, 0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    sweeper = threading.Thread(target=sweep)
    for thread in (sweeper, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    sweeping.set()
    sweeper.join()
    meter.end_sweep(0, 0, 0)
    stats = RunStats()
    meter.end_run(stats)
    assert stats.bytes_moved == {"host_to_device": 2000}
    assert len(meter.spans) == 2000


def events_behind(clock: Clock, lag: list[float]) -> type:
    """As much of ``torch.cuda.Event`` as the meter uses, of a GPU that is ``lag[0]`` seconds behind the host."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.happens = math.inf

        def record(self, stream: object) -> None:
            self.happens = clock() + lag[0]

        def synchronize(self) -> None:
            clock.seconds = max(clock.seconds, self.happens)

        def query(self) -> bool:
            return clock() >= self.happens

        def elapsed_time(self, end: Event) -> float:
            assert end.query()
            return (end.happens - self.happens) * 1e3  # milliseconds

    return Event


def test_what_a_gpu_does_behind_the_host_counts_when_it_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for from 0 to 1, done from 2 to 3, in the middle of which a sweep ends; copies on the host's side are not moved."""
    clock, lag = Clock(), [0.0]
    monkeypatch.setattr(torch.cuda, "Event", events_behind(clock, lag))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    for name, value in {"memory_reserved": 300, "max_memory_reserved": 700, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, {torch.device("cuda"): value}.__getitem__)
    meter = Meter(torch.device("cuda"), clock)
    meter.spans = []
    meter.begin_run()
    lag[0] = 2
    with meter.span("device", Activity("compute", "0,0")), meter.span("disk_read", Activity("load_weights", "1")):
        clock.seconds += 1
    clock.seconds += 1.5
    lag[0] = 0
    meter.end_sweep(0, 0, 0)
    assert [str(span.activity) for span in meter.spans] == ["load_weights 1"]
    clock.seconds += 1.5
    meter.end_sweep(0, 0, 0)
    stats = RunStats()
    meter.end_run(stats)
    assert [sweep.busy_seconds for sweep in stats.per_sweep] == [{"device": 0.5, "disk_read": 1}, {"device": 0.5}]
    assert (meter.spans[1].begin, meter.spans[1].end) == (2, 3)
    assert (stats.idle_bytes, stats.peak_bytes) == (300, 700)


@pytest.mark.gpu(needs="time of its own")
def test_a_gpu_is_timed_by_its_own_events() -> None:
    """The calls return long before the products are done, and the copy runs beside them on a stream of its own."""
    device = torch.device("cuda")
    x = torch.randn(8192, 8192, device=device)
    source = torch.empty(2**28, dtype=torch.uint8).pin_memory()
    target, stream = torch.empty_like(source, device=device), torch.cuda.Stream()
    x @ x
    meter = Meter(device)
    meter.spans = []
    meter.begin_run()
    begun = meter.now()
    with meter.span("device", Activity("compute", "0,0")):
        for _ in range(20):
            x @ x
    asked = meter.now() - begun
    with torch.cuda.stream(stream), meter.span("host_to_device", Activity("load_weights", "1"), num_bytes=source.nbytes):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    passed = meter.now() - begun
    meter.end_sweep(0, 0, 0)
    stats = RunStats()
    meter.end_run(stats)
    computed, copied = sorted(meter.spans)
    assert computed.end - computed.begin > 3 * asked
    assert 0.8 * passed < stats.busy_seconds["device"] < 1.01 * passed
    assert -1e-3 < copied.begin < computed.end
    assert copied.end - copied.begin < passed
