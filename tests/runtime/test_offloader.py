"""Offloader: every part is stored where its plan says, and is lent to its module from there."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from flexgen_helm.errors import CorruptFile
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.weight_store import WeightStore
from flexgen_helm.model.layers import layers_of
from flexgen_helm.policy.model_shapes import EMBEDDINGS
from flexgen_helm.policy.shapes_of_model import plain_formats, shapes_of
from flexgen_helm.policy.weight_plan import WeightPlan
from flexgen_helm.runtime.offload import Offloader
from flexgen_helm.types import TIERS, Tier

OWN_MEMORY = Device(CPU.torch_device, own_memory=True)
NUM_LAYERS = 3
HEAD = NUM_LAYERS
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=4,
    vocab_size=50,
    tie_word_embeddings=False,
)
IDENTITY = {"digest": "aa"}


def make_model() -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG)
    return model


def plan_of(model: PreTrainedModel, tiers: dict[int, Tier], device: Device) -> WeightPlan:
    shapes = shapes_of(model, plain_formats(model), torch.float32)
    return WeightPlan(shapes, tiers, device.own_memory, prefetch=1)


def offloaded(model: PreTrainedModel, tiers: dict[int, Tier], device: Device, folder: Path) -> WeightStore | None:
    """Hands all layers over, as loading does, and returns what lends them."""
    offloader = Offloader(plan_of(model, tiers, device), plain_formats(model), device=device, folder=folder, identity=IDENTITY)
    layers = layers_of(model)
    for j, layer in enumerate(layers):
        if not offloader.has(j):
            offloader.keep(j, layer)
    store = offloader.store(model, layers, Meter(CPU.torch_device))
    if store is None:
        offloader.close()
    return store


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    placed=st.lists(st.sampled_from(TIERS), min_size=NUM_LAYERS + 1, max_size=NUM_LAYERS + 1),
    device=st.sampled_from([CPU, OWN_MEMORY]),
)
def test_every_part_computes_what_it_did_before(placed: list[Tier], device: Device) -> None:
    model = make_model()
    expected = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers_of(model)]
    expected.append({"weight": model.get_output_embeddings().weight.detach().clone()})
    tiers: dict[int, Tier] = {EMBEDDINGS: "device", **dict(enumerate(placed))}
    with tempfile.TemporaryDirectory() as folder:
        store = offloaded(model, tiers, device, Path(folder))
        streamed = plan_of(model, tiers, device).streamed
        assert (store is None) == (not streamed)
        assert {path.name for path in Path(folder).glob("*.slab")} == {
            f"unit_{j:05d}.slab" for j, tier in enumerate(placed) if tier == "disk"
        }
        try:
            for j, module in enumerate([*layers_of(model), model.get_output_embeddings()]):
                if j in streamed:
                    assert store is not None
                    assert all(parameter.is_meta for parameter in module.parameters())
                    store.use(j)
                found: dict[str, Tensor] = module.state_dict()
                assert found.keys() == expected[j].keys()
                assert all(torch.equal(found[name], tensor) for name, tensor in expected[j].items())
                if store is not None and j in streamed:
                    store.release(j)
        finally:
            if store is not None:
                store.close()


def test_slabs_that_are_there_are_not_asked_for_again(tmp_path: Path) -> None:
    model, tiers = make_model(), dict.fromkeys((EMBEDDINGS, *range(NUM_LAYERS + 1)), "disk")
    tiers[EMBEDDINGS] = "host"
    store = offloaded(model, tiers, CPU, tmp_path)  # type: ignore[arg-type]
    assert store is not None
    store.close()
    plan = plan_of(make_model(), tiers, CPU)  # type: ignore[arg-type]
    again = Offloader(plan, plain_formats(model), device=CPU, folder=tmp_path, identity=IDENTITY)
    assert [again.has(j) for j in range(NUM_LAYERS + 1)] == [True] * (NUM_LAYERS + 1)
    again.close()
    (tmp_path / "unit_00001.slab").unlink()
    again = Offloader(plan, plain_formats(model), device=CPU, folder=tmp_path, identity=IDENTITY)
    assert [again.has(j) for j in range(NUM_LAYERS + 1)] == [True, False, True, True]
    again.close()


def test_slabs_of_other_weights_are_never_used(tmp_path: Path) -> None:
    model = make_model()
    tiers: dict[int, Tier] = {EMBEDDINGS: "host", **dict.fromkeys(range(NUM_LAYERS + 1), "disk")}
    store = offloaded(model, tiers, CPU, tmp_path)
    assert store is not None
    store.close()
    with pytest.raises(CorruptFile, match="digest aa, not of digest bb"):
        Offloader(plan_of(model, tiers, CPU), plain_formats(model), device=CPU, folder=tmp_path, identity={"digest": "bb"})
