"""What the C library keeps of freed tensors, against what the kernel says of it."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from flexgen_helm.memory.allocator import map_large_tensors
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


@alone
def test_large_tensors_go_back_as_they_are_freed() -> None:
    map_large_tensors(True)
    assert given_back_of_holes() == pytest.approx(16 * SIZE, rel=0.02)


@alone
def test_small_models_keep_what_they_will_need_again() -> None:
    map_large_tensors(True)
    map_large_tensors(False)
    assert given_back_of_holes() < SIZE
