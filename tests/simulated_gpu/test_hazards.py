"""Who frees device memory must be ordered behind its users, unless one of those who held it waited for them."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from tests.simulated_gpu.patches import simulated_gpu


@pytest.mark.parametrize("waits", [True, False])
def test_memory_that_another_thread_copies_is_freed(waits: bool) -> None:
    with simulated_gpu() as gpu:
        box: list[Tensor] = [torch.ones(8, device="cuda")]
        copied = threading.Event()

        def copy() -> None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                torch.empty(8, pin_memory=not waits).copy_(box[0], non_blocking=not waits)
            copied.set()

        thread = threading.Thread(target=copy)
        thread.start()
        copied.wait()
        box.clear()
        thread.join()
    assert bool(gpu.hazards) != waits
