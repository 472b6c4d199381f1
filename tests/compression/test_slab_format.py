"""Compressed slabs: what is carried to a device and unpacked there has the bits of what a CPU loads at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from flexgen_helm.compression import coding
from flexgen_helm.compression.allocation import LADDERS
from flexgen_helm.compression.matrices import matrix_tensors
from flexgen_helm.compression.scheme import Parts, Scheme
from flexgen_helm.compression.schemes import scheme_of
from flexgen_helm.compression.slab_format import CompressedSlab, compressed_slab, layout_of_tensors, stored_tensors
from flexgen_helm.errors import CorruptFile
from flexgen_helm.memory.slab import SlabLayout, layout_of
from tests.compression.matrices import make_matrix
from tests.simulated_gpu.gpu import SimulatedGpu
from tests.simulated_gpu.patches import simulated_gpu

SCHEMES = {
    "w4-minmax": scheme_of("minmax", 4.5),
    "w4": scheme_of("fixed", 4.5),
    "w4-entropy": scheme_of("entropy", 4.5),
    "w4-self": scheme_of("self", 4.5),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUT, IN = 70, 90


class Unit(nn.Module):
    """Matrices with integers beyond int8, and a tensor that is none."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(IN, OUT, dtype=dtype) for _ in range(2))
        self.norm = nn.LayerNorm(OUT, dtype=dtype)


def decided(scheme: str, shape: tuple[int, int], columns: Tensor) -> Parts:
    """What a model's statistics would decide about a matrix."""
    if scheme in ("w4-entropy", "w4-self"):  # small steps, so that outliers take more than a byte
        rows = torch.arange(1.0, shape[0] + 1) ** 3
        return {"columns": columns, "rows": rows, "rule": torch.tensor([0.005, 1.0], dtype=torch.float64)}
    if scheme == "w4":
        ladder = torch.tensor(LADDERS[4], dtype=torch.uint8)
        return {"widths": ladder[torch.arange(shape[1]) % 3 % len(ladder)]}
    return {}


def compressed(name: str, dtype: torch.dtype) -> tuple[CompressedSlab, Tensor]:
    """A slab with both matrices packed."""
    unit, scheme, packed = Unit(dtype), SCHEMES[name], {}
    for seed, tensor in enumerate(matrix_tensors(unit)):
        weight, columns = make_matrix(OUT, IN, seed, outliers=5)
        packed[tensor.name] = [scheme.pack(weight, decided(name, (OUT, IN), columns))]
    tensors = stored_tensors(unit, packed)
    layout = layout_of_tensors(tensors.items())
    stored = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for place, value in zip(layout.tensors, tensors.values(), strict=True):
        place.view(stored).copy_(value)
    return compressed_slab(layout, layout_of(unit), scheme, {x.name: x for x in matrix_tensors(unit)}), stored


@pytest.fixture(autouse=True)
def _small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "BLOCK_WEIGHTS", 1500)
    monkeypatch.setattr(coding, "FRAME_WEIGHTS", 200)


def filled(layout: SlabLayout) -> Tensor:
    return torch.full((layout.num_bytes + 7,), 9, dtype=torch.uint8)


def tensors_of(layout: SlabLayout, memory: Tensor) -> list[bytes]:
    return [place.view(memory).view(-1).view(torch.uint8).numpy().tobytes() for place in layout.tensors]


def carried(form: CompressedSlab, stored: Tensor) -> Tensor:
    if not form.is_coded:
        assert form.carried == form.stored
        return stored
    memory = filled(form.carried)
    form.decode(stored, memory)
    return memory


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    with simulated_gpu() as gpu:
        yield gpu


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_both_ways_lead_to_the_same_bits(name: str, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    form, stored = compressed(name, dtype)
    at_once, by_steps = filled(form.bound), filled(form.bound)
    form.load(stored, at_once)
    form.unpack(carried(form, stored), by_steps)
    assert tensors_of(form.bound, at_once) == tensors_of(form.bound, by_steps)
    first = form.bound.tensors[0].view(at_once).float()
    assert torch.equal(first, first.nan_to_num())
    assert float(first.abs().max()) > 100  # outliers are there


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_gpu_unpacks_to_the_same_bits_and_nobody_waits_for_it(name: str, dtype: torch.dtype, gpu: SimulatedGpu) -> None:
    form, stored = compressed(name, dtype)
    expected = filled(form.bound)
    form.load(stored, expected)
    there, bound = carried(form, stored).to("cuda"), torch.zeros(form.bound.num_bytes, dtype=torch.uint8, device="cuda")
    gpu.log.clear()
    form.unpack(there, bound)
    assert gpu.log
    assert not [event for event in gpu.log if event.kind != "launch"]
    assert tensors_of(form.bound, bound.cpu()) == tensors_of(form.bound, expected)
    assert not gpu.faults


def test_what_is_carried_of_coded_weights_is_a_byte_each_with_steps_and_factors() -> None:
    form, _ = compressed("w4-entropy", torch.bfloat16)
    sizes = {place.names[0]: place for place in form.carried.tensors}
    for name in ("first.weight", "second.weight"):
        exceptions = sizes[f"{name}/0/values"].shape[0]
        assert exceptions >= 5
        found = sum(place.num_bytes for key, place in sizes.items() if key.startswith(f"{name}/"))
        assert found == OUT * IN + 2 * IN + 4 * OUT + (8 + 4) * exceptions
    assert sum(place.num_bytes for key, place in sizes.items() if key.startswith("norm")) == sum(
        place.num_bytes for place in form.bound.tensors if place.names[0].startswith("norm")
    )


def test_damage_is_noticed_while_decoding() -> None:
    form, stored = compressed("w4-entropy", torch.bfloat16)
    frames = next(place for place in form.stored.tensors if place.names[0] == "second.weight/0/data")
    frames.view(stored)[20] ^= 4
    for fill, layout in ((form.decode, form.carried), (form.load, form.bound)):
        with pytest.raises(CorruptFile, match="damaged"):
            fill(stored, filled(layout))


def test_schemes_know_their_kind() -> None:
    schemes: dict[str, Scheme] = dict(SCHEMES)
    assert {name for name in schemes if compressed(name, torch.float32)[0].is_coded} == {"w4-entropy", "w4-self"}
