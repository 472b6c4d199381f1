"""What the C library keeps of freed tensors, against what the kernel says of it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from flexgen_helm.memory.allocator import LARGE_TENSOR_MAPS, return_freed_memory
from tests.memory.alone import alone
from tests.memory.test_buffers import resident_bytes

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs the C library of GNU")

SIZE = 4 * 2**20


def given_back_of_holes() -> int:
    """Bytes that a thread gives back of every other one of 32 tensors of 4 MiB."""
    found = []

    def work() -> None:
        tensors = [torch.ones(SIZE, dtype=torch.uint8) for _ in range(32)]
        held = resident_bytes()
        del tensors[::2]
        found.append(held - resident_bytes())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


@contextmanager
def mapped() -> Iterator[None]:
    """All tests of this file share a process."""
    LARGE_TENSOR_MAPS.begin()
    try:
        yield
    finally:
        LARGE_TENSOR_MAPS.end()


@alone
def test_large_tensors_go_back_as_they_are_freed() -> None:
    with mapped():
        assert given_back_of_holes() == pytest.approx(16 * SIZE, rel=0.02)


@alone
def test_small_models_keep_what_they_will_need_again() -> None:
    with mapped():
        pass
    assert given_back_of_holes() < SIZE


@alone
def test_one_of_two_that_closes_leaves_the_other_alone() -> None:
    with mapped():
        with mapped():
            pass
        assert given_back_of_holes() == pytest.approx(16 * SIZE, rel=0.02)


def test_what_torch_keeps_of_a_gpu_is_returned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    return_freed_memory()
    assert emptied
