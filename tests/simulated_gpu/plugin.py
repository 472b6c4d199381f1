"""For pytest: where torch sees no CUDA device, tests marked ``gpu`` run on the simulated one."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.simulated_gpu.patches import simulated_gpu


@pytest.fixture(autouse=True)
def gpu_of_marked_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """Simulates a GPU for a test marked ``gpu``, which fails where work was not ordered or operands on different devices.

    The mark's argument ``needs`` says what of a real GPU a test cannot do without; it is then skipped.
    """
    mark = request.node.get_closest_marker("gpu")
    if mark is None or torch.cuda.is_available():
        yield
        return
    if "needs" in mark.kwargs:
        pytest.skip(f"torch sees no CUDA device on this machine, and a simulated one has no {mark.kwargs['needs']}")
    with simulated_gpu() as gpu:
        yield
        gc.collect()
        assert not gpu.faults, "\n".join(gpu.faults)
