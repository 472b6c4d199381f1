"""Copies between host and device: what arrives, and whether anybody waits for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from flexgen_helm.memory import copies
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.carrier import Carrier
from flexgen_helm.memory.copies import copy_in_pieces, to_device, to_host, upload
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.slab import Plain
from flexgen_helm.run_stats import RunStats
from tests.simulated_gpu.gpu import SimulatedGpu
from tests.simulated_gpu.patches import simulated_gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    with simulated_gpu() as gpu:
        yield gpu
    assert not gpu.faults, "\n".join(gpu.faults)


def counted(gpu: SimulatedGpu) -> Counter[str]:
    """What the device was asked to do, and what was waited for."""
    return Counter(event.what if event.kind == "copy" else event.kind for event in gpu.log)


@pytest.mark.parametrize("values", [[3, 1, 2], [[1, 2], [3, 4], [5, 6]]])
def test_numbers_are_uploaded_without_a_wait(gpu: SimulatedGpu, values: list[int]) -> None:
    there = upload(values, CUDA)
    assert counted(gpu) == {"h2d pinned": 1}
    assert (there.device.type, there.dtype, there.tolist()) == ("cuda", torch.long, values)
    assert upload(values, CUDA, torch.int32).dtype == torch.int32
    assert upload([], CUDA).tolist() == []


def test_a_tensor_goes_to_the_device_without_a_wait(gpu: SimulatedGpu) -> None:
    x = torch.arange(12.0).view(3, 4).T
    there = to_device(x, CUDA)
    assert counted(gpu) == {"h2d pinned": 1}
    x.zero_()  # it is not the memory that travels
    assert torch.equal(there.cpu(), torch.arange(12.0).view(3, 4).T)
    assert to_device(there, CUDA) is there


def test_tensors_come_to_the_host_with_one_wait(gpu: SimulatedGpu) -> None:
    there = [torch.full((n, 3), float(n), device=CUDA).T for n in range(1, 4)]
    gpu.log.clear()
    here = to_host(there)
    assert counted(gpu) == {"d2h pinned": 3, "wait": 1}
    assert all(torch.equal(x, torch.full((3, n), float(n))) for n, x in enumerate(here, 1))


def test_nothing_is_copied_on_a_cpu() -> None:
    x = torch.arange(6)
    assert to_device(x, CPU) is x
    assert to_host([x])[0] is x
    assert upload([1, 2], CPU).tolist() == [1, 2]


@pytest.mark.parametrize(("num_bytes", "pieces"), [(1, 1), (4096, 1), (4097, 2), (3 * 4096, 3)])
def test_long_copies_travel_in_pieces(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, num_bytes: int, pieces: int) -> None:
    monkeypatch.setattr(copies, "PIECE_BYTES", 4096)
    source = allocate(num_bytes, pin=True)[:num_bytes]
    source.copy_(torch.arange(num_bytes) % 251)
    target: Tensor = torch.empty(num_bytes, dtype=torch.uint8, device=CUDA)
    gpu.log.clear()
    copy_in_pieces(target, source)
    assert counted(gpu) == {"h2d pinned": pieces}
    torch.cuda.synchronize()
    assert torch.equal(target.cpu(), source)


def test_a_layer_travels_in_pieces_and_is_measured_as_one(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "PIECE_BYTES", 4096)
    form = Plain.of(nn.Linear(64, 64, bias=False))
    carried = allocate(form.carried.num_bytes, pin=True)
    slot = torch.empty(len(carried), dtype=torch.uint8, device=CUDA)
    meter, stats = Meter(CUDA), RunStats()
    meter.spans = []
    carrier = Carrier([form], Device(CUDA), meter)
    meter.begin_run()
    gpu.log.clear()
    carrier.carry(form, carried, slot, 3)
    assert counted(gpu) == {"h2d pinned": 64 * 64 * 4 // 4096}
    torch.cuda.synchronize()
    meter.end_sweep(0, 0, 0)
    meter.end_run(stats)
    assert [(span.activity.kind, span.num_bytes) for span in meter.spans] == [("load_weights", 64 * 64 * 4)]
    del slot, carried
