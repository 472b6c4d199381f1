"""Modules whose weights are views of a slab, against the modules themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from flexgen_helm.memory.amounts import PAGE
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.slab import ALIGNMENT, Binding, layout_of, pack

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn]
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).view(shape)


def bits(module: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    state = module.state_dict()
    return {name: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in state.items()}


def through_slab(module: nn.Module) -> tuple[nn.Module, Tensor]:
    """A module of the same kind that was never anywhere but on meta and in a slab."""
    layout = layout_of(module)
    memory = allocate(layout.num_bytes)
    pack(module, layout, memory)
    bound = copy.deepcopy(module)
    binding = Binding(bound, layout)
    binding.to_meta()
    assert all(tensor.is_meta for tensor in bound.state_dict().values())
    binding.bind(memory)
    return bound, memory


@settings(derandomize=True, max_examples=40, deadline=None)
@given(tensors=st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES, st.booleans()), max_size=8))
def test_every_bit_comes_back(tensors: list[tuple[torch.dtype, tuple[int, ...], bool]]) -> None:
    module = nn.Module()
    for i, (dtype, shape, is_parameter) in enumerate(tensors):
        value = random_bits(dtype, shape)
        if is_parameter:
            setattr(module, f"weight_{i}", nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(f"buffer_{i}", value)
    bound, memory = through_slab(module)
    assert bits(bound) == bits(module)
    assert [name for name, _ in bound.named_parameters()] == [name for name, _ in module.named_parameters()]
    begins = [tensor.data_ptr() - memory.data_ptr() for tensor in bound.state_dict().values() if tensor.numel()]
    assert all(begin % ALIGNMENT == 0 and 0 <= begin < len(memory) for begin in begins)
    layout = layout_of(module)
    assert layout.num_bytes % PAGE == 0
    assert layout_of(module.to("meta")) == layout


class Tied(nn.Module):
    """Tied weights, a buffer of no dimensions, and one that is not saved."""

    kept: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.inner = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6))
        self.inner[0].weight = self.first.weight
        self.register_buffer("kept", torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(self.first(x))) * self.kept.sum()


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    module = Tied().eval()
    layout = layout_of(module)
    assert layout.tensors[0].names == ("first.weight", "inner.0.weight")
    with torch.device("meta"):
        assert layout_of(Tied()) == layout
    bound, memory = through_slab(module)
    assert isinstance(bound, Tied)
    assert bound.first.weight is bound.inner[0].weight
    x = torch.randn(4, 6)
    assert torch.equal(bound(x), module(x))
    memory.zero_()
    assert not any(tensor.any() for tensor in bound.state_dict().values())
    assert torch.equal(bound.kept, module.kept)


def tiny_llama() -> LlamaConfig:
    return LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def tiny_mixtral() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )


@pytest.mark.parametrize("config", [tiny_llama, tiny_mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_take_turns_in_one_slot(config: Callable[[], LlamaConfig | MixtralConfig], dtype: torch.dtype) -> None:
    """Two layers share the memory of one, each copied there right before it is called."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=dtype).eval()
    tokens = torch.randint(0, 64, (1, 12))
    with torch.inference_mode():
        expected = model(tokens).logits
    layers = list(model.model.layers)
    layouts = [layout_of(layer) for layer in layers]
    slabs, bindings = [], []
    for layer, layout in zip(layers, layouts, strict=True):
        slabs.append(allocate(layout.num_bytes))
        pack(layer, layout, slabs[-1])
        bindings.append(Binding(layer, layout))
        bindings[-1].to_meta()
    slot = allocate(max(layout.num_bytes for layout in layouts))

    def load(binding: Binding, slab: Tensor) -> Callable[..., None]:
        def hook(*_: object) -> None:
            slot.copy_(slab)
            binding.bind(slot)

        return hook

    for layer, binding, slab in zip(layers, bindings, slabs, strict=True):
        layer.register_forward_pre_hook(load(binding, slab))
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, expected)
        assert torch.equal(model(tokens).logits, expected)
