"""Streamed weights: the right slab is bound whenever a part is used, from every tier and in every format."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flexgen_helm.errors import CorruptFile
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.slab import Binding, Plain, SlabFormat, SlabLayout, SlabTensor, layout_of
from flexgen_helm.memory.weight_store import Unit, WeightStore
from flexgen_helm.run_stats import RunStats

OWN_MEMORY = Device(CPU.torch_device, own_memory=True)
NUM_PARTS = 5
SIZE = 40


@dataclass(frozen=True)
class Halved:
    """Weights stored in 16 bits and used in 32: the smallest format whose stored form is not the used one."""

    bound: SlabLayout
    is_coded = False
    is_packed = True

    @property
    def stored(self) -> SlabLayout:
        return self.carried

    @property
    def carried(self) -> SlabLayout:
        tensors = [SlabTensor(t.names, torch.float16, t.shape, t.offset // 2) for t in self.bound.tensors]
        return SlabLayout(tuple(tensors), self.bound.num_bytes // 2)

    def decode(self, stored: Tensor, carried: Tensor) -> None:
        raise AssertionError

    def unpack(self, carried: Tensor, bound: Tensor) -> None:
        for source, target in zip(self.carried.tensors, self.bound.tensors, strict=True):
            target.view(bound).copy_(source.view(carried))

    def load(self, stored: Tensor, bound: Tensor) -> None:
        self.unpack(stored, bound)


@dataclass(frozen=True)
class Doubled:
    """Weights stored twice over, every bit inverted the second time: the smallest format that must be decoded."""

    bound: SlabLayout
    is_coded = True
    is_packed = False

    @property
    def carried(self) -> SlabLayout:
        return self.bound

    @property
    def stored(self) -> SlabLayout:
        tensor = SlabTensor(("twice",), torch.uint8, (2, self.carried.num_bytes), 0)
        return SlabLayout((tensor,), tensor.num_bytes)

    def decode(self, stored: Tensor, carried: Tensor) -> None:
        carried[: self.carried.num_bytes].copy_(~self.stored.tensors[0].view(stored)[1])

    def unpack(self, carried: Tensor, bound: Tensor) -> None:
        raise AssertionError

    def load(self, stored: Tensor, bound: Tensor) -> None:
        self.decode(stored, bound)


@dataclass(frozen=True)
class DoubledHalves(Doubled):
    """All three forms differ."""

    is_packed = True

    @property
    def carried(self) -> SlabLayout:
        return Halved(self.bound).carried

    def unpack(self, carried: Tensor, bound: Tensor) -> None:
        Halved(self.bound).unpack(carried, bound)

    def load(self, stored: Tensor, bound: Tensor) -> None:
        carried = torch.empty(self.carried.num_bytes, dtype=torch.uint8)
        self.decode(stored, carried)
        self.unpack(carried, bound)


Form = type[Plain] | type[Halved] | type[Doubled]
FORMS: list[Form] = [Plain, Halved, Doubled, DoubledHalves]


def stored_slab(form: SlabFormat, module: nn.Module) -> Tensor:
    """Stores a module's weights."""
    carried, stored = allocate(form.carried.num_bytes), allocate(form.stored.num_bytes)
    for target, tensor in zip(form.carried.tensors, module.state_dict().values(), strict=True):
        target.view(carried).copy_(tensor)
    stored[: form.carried.num_bytes] = carried
    if form.is_coded:
        stored[form.carried.num_bytes :] = ~carried
    return stored


class Disk:
    """Slabs that are read at once, or not at all."""

    def __init__(self, slabs: dict[int, Tensor]) -> None:
        self.slabs, self.broken, self.closed = slabs, set[int](), 0

    def read(self, j: int, into: Tensor) -> Future[None]:
        done: Future[None] = Future()
        if j in self.broken:
            done.set_exception(CorruptFile(f"slab {j} is torn"))
        else:
            into[: len(self.slabs[j])].copy_(self.slabs[j])
            done.set_result(None)
        return done

    def close(self) -> None:
        self.closed += 1


class Parts:
    """Linear layers, whose weights a store lends to them."""

    def __init__(
        self,
        device: Device,
        on_disk: set[int],
        *,
        num_slots: int = 2,
        form: Form = Plain,
        on_device: frozenset[int] = frozenset(),
    ) -> None:
        self.modules = [nn.Linear(SIZE, SIZE + j) for j in range(NUM_PARTS)]
        self.expected = [module.weight.detach().clone() for module in self.modules]
        if form in (Halved, DoubledHalves):
            self.expected = [weight.half().float() for weight in self.expected]
        self.formats: list[SlabFormat] = [form(layout_of(module)) for module in self.modules]
        self.slabs = {j: stored_slab(each, self.modules[j]) for j, each in enumerate(self.formats)}
        units = {}
        for j, (module, each) in enumerate(zip(self.modules, self.formats, strict=True)):
            binding = Binding(module, each.bound)
            binding.to_meta()
            memory = None if j in on_disk else self.slabs[j]
            if j in on_device and each.is_coded:
                memory = allocate(each.carried.num_bytes)
                each.decode(self.slabs[j], memory)
            units[j] = Unit(binding, each, memory, j in on_device)
        self.disk = Disk({j: self.slabs[j] for j in on_disk})
        self.meter = Meter(CPU.torch_device)
        self.store = WeightStore(units, device=device, num_slots=num_slots, source=self.disk, meter=self.meter)

    def use(self, j: int) -> bool:
        """Whether part j has its own weights once it is used."""
        self.store.use(j)
        return torch.equal(self.modules[j].weight, self.expected[j])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", [CPU, OWN_MEMORY], ids=["shared memory", "own memory"])
@settings(derandomize=True, deadline=None, max_examples=30)
@given(on_disk=st.sets(st.integers(0, NUM_PARTS - 1)), num_slots=st.integers(1, NUM_PARTS), sweeps=st.integers(1, 3))
def test_every_part_has_its_weights_in_the_cycle_of_sweeps(
    device: Device, form: Form, on_disk: set[int], num_slots: int, sweeps: int
) -> None:
    parts = Parts(device, on_disk, num_slots=num_slots, form=form)
    try:
        for j in range(num_slots):
            parts.store.begin(j)
        for turn in range(sweeps * NUM_PARTS):
            j = turn % NUM_PARTS
            assert parts.use(j)
            parts.store.release(j)
            parts.store.begin((turn + num_slots) % NUM_PARTS)
    finally:
        parts.store.close()


def test_host_slabs_are_used_in_place_without_a_memory_of_the_devices_own() -> None:
    parts = Parts(CPU, set())
    assert parts.use(3)
    assert parts.modules[3].weight.data_ptr() == parts.slabs[3].data_ptr()
    parts.store.close()


def test_a_loaded_unit_stays_while_a_slot_is_empty() -> None:
    parts = Parts(OWN_MEMORY, set(), num_slots=3)
    parts.meter.begin_run()
    for j in (2, 0, 1, 2, 0, 1):
        assert parts.use(j)
        parts.store.release(j)
    parts.meter.end_sweep(0, 0, 0)
    parts.meter.end_run(stats := RunStats())
    parts.store.close()
    assert stats.bytes_moved["host_to_device"] == sum(parts.formats[j].carried.num_bytes for j in (0, 1, 2))


@pytest.mark.parametrize("form", FORMS)
def test_the_disk_gives_the_stored_form_and_the_link_the_carried_one(form: Form) -> None:
    on_device = frozenset({0, 2} if form in (Halved, DoubledHalves) else {})
    parts = Parts(OWN_MEMORY, {1, 4}, num_slots=NUM_PARTS, form=form, on_device=on_device)
    stats = RunStats()
    parts.meter.begin_run()
    for j in range(NUM_PARTS):
        assert parts.use(j)
    parts.meter.end_sweep(0, 0, 0)
    parts.meter.end_run(stats)
    parts.store.close()
    stored = [each.stored.num_bytes for each in parts.formats]
    carried = [each.carried.num_bytes for each in parts.formats]
    assert stats.bytes_moved["host_to_device"] == sum(size for j, size in enumerate(carried) if j not in on_device)
    assert stats.bytes_moved["disk_read"] >= stored[1] + stored[4]
    assert stats.per_sweep[0].weight_bytes_moved == stats.bytes_moved


@pytest.mark.parametrize("device", [CPU, OWN_MEMORY], ids=["shared memory", "own memory"])
def test_a_torn_slab_is_told_and_the_others_are_still_lent(device: Device) -> None:
    parts = Parts(device, {1, 2})
    parts.disk.broken.add(1)
    with pytest.raises(CorruptFile, match="slab 1 is torn"):
        parts.use(1)
    parts.store.release_all()
    assert parts.use(0)
    assert parts.use(2)
    parts.disk.broken.clear()
    parts.store.release_all()
    assert parts.use(1)
    parts.store.close()


@pytest.mark.parametrize("device", [CPU, OWN_MEMORY], ids=["shared memory", "own memory"])
def test_a_sweep_that_is_given_up_leaves_all_slots(device: Device) -> None:
    parts = Parts(device, {0, 1, 2, 3, 4})
    for j in (0, 1):
        parts.store.begin(j)
    parts.store.release_all()
    for j in (3, 4):
        assert parts.use(j)
    parts.store.close()
    parts.store.close()
    assert parts.disk.closed == 2
