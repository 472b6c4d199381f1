"""A link does what it is given in order, beside the computation, and tells what went wrong to whoever waits."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from flexgen_helm.memory.link import Link

CPU = torch.device("cpu")


def test_work_runs_in_the_order_of_its_submission_and_beside_the_caller() -> None:
    link, gate, done = Link(CPU, "test"), threading.Event(), list[int]()

    def first() -> None:
        assert gate.wait(timeout=30)
        done.append(0)

    transfers = [link.submit(first), *(link.submit(partial(done.append, i)) for i in range(1, 20))]
    assert done == []
    gate.set()
    transfers[-1].wait()
    assert done == list(range(20))
    link.close()


def test_a_failure_is_told_to_who_waits_for_it_and_what_follows_still_runs() -> None:
    link, done = Link(CPU, "test"), list[str]()

    def fail() -> None:
        raise ValueError("no such page")

    failed, following = link.submit(fail), link.submit(lambda: done.append("following"))
    with pytest.raises(ValueError, match="no such page"):
        failed.wait()
    following.wait()
    assert done == ["following"]
    link.close()


def test_nothing_that_waits_runs_after_close() -> None:
    link, gate, done = Link(CPU, "test"), threading.Event(), list[str]()
    started = threading.Event()

    def running() -> None:
        started.set()
        assert gate.wait(timeout=30)
        done.append("running")

    link.submit(running)
    link.submit(lambda: done.append("waiting"))
    assert started.wait(timeout=30)
    closing = threading.Thread(target=link.close)
    closing.start()
    closing.join(timeout=0.05)
    gate.set()
    closing.join()
    assert done == ["running"]


def test_tensors_are_made_without_gradients() -> None:
    link, made = Link(CPU, "test"), list[torch.Tensor]()
    link.submit(lambda: made.append(torch.ones(2, requires_grad=True) * 2)).wait()
    assert made[0].is_inference()
    link.close()


@pytest.mark.gpu
def test_copies_have_ended_when_a_link_is_closed() -> None:
    """Else what they read would be unpinned, and what they write be freed, while they go on."""
    device = torch.device("cuda")
    link, source = Link(device, "test"), torch.arange(2**20).pin_memory()
    target, begun = torch.empty_like(source, device=device), threading.Event()

    def copy(source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        begun.set()

    link.submit(partial(copy, source, target))
    assert begun.wait(timeout=30)
    link.close()
    copied = target.cpu()
    del source, target
    assert torch.equal(copied, torch.arange(2**20))
