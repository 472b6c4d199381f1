"""Layer calls that rest: the device goes on with another row, and what follows a call waits for its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.attention.host import rest
from flexgen_helm.execution.suspended_calls import RestingCalls
from tests.jobs import random_tokens
from tests.workbench import OWN_MEMORY, Workbench


def call(log: list[str], name: str, num_rests: int = 1) -> Callable[[], None]:
    """Notes where it is; each rest is one attention on the CPU."""

    def run() -> None:
        try:
            for i in range(num_rests):
                log.append(f"{name}{i}")
                rest()
            log.append(f"{name} ends")
        finally:
            log.append(f"{name} left")

    return run


def test_one_rests_while_the_next_runs_and_what_follows_it_waits() -> None:
    log: list[str] = []
    resting = RestingCalls()
    for k, name in enumerate("abc"):
        resting.run(k, call(log, name, num_rests=k), nullcontext)
        if not resting.defer(k, partial(log.append, f"store {name}")):
            log.append(f"store {name} at once")
    first = ["a ends", "a left", "store a at once", "b0", "c0", "b ends", "b left", "store b"]
    assert log == first
    resting.end(0)
    assert log == first
    resting.end(2)
    assert log == [*first, "c1", "c ends", "c left", "store c"]


def test_after_an_error_nothing_rests() -> None:
    log: list[str] = []
    resting = RestingCalls()
    resting.run(0, call(log, "a"), nullcontext)

    def faulty() -> None:
        raise ValueError("of this row")

    with pytest.raises(ValueError, match="of this row"):
        resting.run(1, faulty, nullcontext)
    resting.drop()
    assert log == ["a0", "a left"]
    resting.end()
    resting.run(1, call(log, "b", num_rests=0), nullcontext)
    assert log[2:] == ["b ends", "b left"]


def test_without_anyone_to_go_on_it_does_not_rest() -> None:
    log: list[str] = []
    call(log, "a")()
    assert log == ["a0", "a ends", "a left"]


@pytest.mark.parametrize("overlap", [True, False])
def test_rows_rest_in_the_engine_while_the_cpu_attends(bench: Workbench, tmp_path: Path, overlap: bool) -> None:
    """Between the two times that a decode row has the device in a layer, another row has it."""
    policy = Policy(16, 4, 32, cache=(0, 1, 0), overlap=overlap)
    jobs = [Job(token_ids=random_tokens(seed, 130), max_new_tokens=2, ignore_eos=True) for seed in range(64)]
    with Engine.from_pretrained(str(bench.folder("llama")), device=OWN_MEMORY, policy=policy) as engine:
        engine.meter.spans = []
        engine.run(jobs)
        spans = sorted((span for span in engine.meter.spans if span.resource == "device"), key=lambda span: span.begin)
    names = [span.name for span in spans]
    assert any(first == last != between for first, between, last in zip(names, names[1:], names[2:], strict=False)) == overlap
