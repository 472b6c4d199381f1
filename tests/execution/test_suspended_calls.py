"""Layer calls that are suspended: the device goes on with another row, and what follows a call waits for its end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial

import pytest
from greenlet import getcurrent, greenlet

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.execution.suspended_calls import SuspendedCalls
from tests.jobs import random_tokens
from tests.workbench import OWN_MEMORY, Workbench


def call(calls: SuspendedCalls, log: list[str], name: str, times: int = 1) -> Callable[[], None]:
    """Notes where it is; each time that it is suspended is one attention on the CPU."""

    def run() -> None:
        try:
            for i in range(times):
                log.append(f"{name}{i}")
                calls.suspend()
            log.append(f"{name} ends")
        finally:
            log.append(f"{name} left")

    return run


def test_one_is_suspended_while_the_next_runs_and_what_follows_it_waits() -> None:
    log: list[str] = []
    calls = SuspendedCalls()
    for k, name in enumerate("abc"):
        calls.run(k, call(calls, log, name, times=k), nullcontext)
        if not calls.defer(k, partial(log.append, f"store {name}")):
            log.append(f"store {name} at once")
    first = ["a ends", "a left", "store a at once", "b0", "c0", "b ends", "b left", "store b"]
    assert log == first
    calls.end(0)
    assert log == first
    calls.end(2)
    assert log == [*first, "c1", "c ends", "c left", "store c"]


def test_after_an_error_nothing_is_suspended() -> None:
    log: list[str] = []
    calls = SuspendedCalls()
    calls.run(0, call(calls, log, "a"), nullcontext)

    def faulty() -> None:
        raise ValueError("of this row")

    with pytest.raises(ValueError, match="of this row"):
        calls.run(1, faulty, nullcontext)
    calls.drop()
    assert log == ["a0", "a left"]
    calls.end()
    calls.run(1, call(calls, log, "b", times=0), nullcontext)
    assert log[2:] == ["b ends", "b left"]


def test_a_call_that_was_not_started_here_just_waits() -> None:
    """Neither outside of any greenlet, nor in somebody else's, whose parent must not be woken."""
    log: list[str] = []
    calls = SuspendedCalls()
    call(calls, log, "a")()
    assert log == ["a0", "a ends", "a left"]
    others = greenlet(call(calls, log, "b"))
    others.switch()
    assert others.dead
    assert log[3:] == ["b0", "b ends", "b left"]


def test_calls_go_back_to_the_greenlet_that_runs_them() -> None:
    log: list[str] = []
    calls = SuspendedCalls()

    def executor() -> None:
        calls.run(0, call(calls, log, "a"), nullcontext)
        log.append("goes on")
        calls.end()

    greenlet(executor).switch()
    assert log == ["a0", "goes on", "a ends", "a left"]


@pytest.mark.parametrize("overlap", [True, False])
def test_rows_are_suspended_in_the_engine_while_the_cpu_attends(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """Between the two times that a decode row has the device in a layer, another row has it."""
    # A fast CPU may have attended before the layer looks, and then no call is suspended.
    monkeypatch.setattr(Future, "done", lambda future: False)
    policy = Policy(16, 4, 32, cache=(0, 1, 0), overlap=overlap)
    jobs = [Job(token_ids=random_tokens(seed, 130), max_new_tokens=2, ignore_eos=True) for seed in range(64)]
    with Engine.from_pretrained(str(bench.folder("llama")), device=OWN_MEMORY, policy=policy) as engine:
        engine.meter.spans = []
        engine.run(jobs)
        spans = sorted((span for span in engine.meter.spans if span.resource == "device"), key=lambda span: span.begin)
    names = [str(span.activity) for span in spans]
    assert any(first == last != between for first, between, last in zip(names, names[1:], names[2:], strict=False)) == overlap


def test_what_ran_calls_is_not_kept() -> None:
    """A main greenlet that something keeps beyond its thread makes the thread's end search the whole heap for it."""
    suspended = SuspendedCalls()
    for k in range(3):
        suspended.run(k, call(suspended, [], "a"), nullcontext)
    suspended.end()
    assert not any(kept is getcurrent() for kept in vars(suspended).values())
