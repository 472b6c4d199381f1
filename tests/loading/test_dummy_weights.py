"""Dummy weights make every architecture run with finite numbers, the same ones wherever and in whatever order they are made."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from flexgen_helm.loading import assembly
from flexgen_helm.loading.dummy_weights import SCALE, make_first_layers, make_model
from flexgen_helm.model.layers import layers_of
from tests.loading.test_kept_layers import Keeper
from tests.loading.test_read_model import CPU, everything, ties
from tests.models import FAMILIES, SINGLE, Family, SingleFamily

FEW_TOKENS = 100
SPECS: dict[str, Family | SingleFamily] = {**FAMILIES, **SINGLE}
FAST = ["llama", "opt", "gpt2", "gpt_neo", "gpt_oss", "deepseek_v3", "falcon_h1", "jamba", "qwen3_next"]
ALL = [*FAST, *(pytest.param(family, marks=pytest.mark.slow) for family in SPECS if family not in FAST)]


def make(family: str, dtype: torch.dtype = torch.bfloat16, keeper: Keeper | None = None) -> PreTrainedModel:
    return make_model(SPECS[family].build(), dtype=dtype, device=CPU, keeper=keeper)


@pytest.mark.parametrize("family", ALL)
def test_everything_but_values_is_as_the_library_makes_it(family: str) -> None:
    model, expected = make(family, torch.float32), AutoModelForCausalLM.from_config(SPECS[family].build()).eval()
    found, tensors = everything(model), everything(expected)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in tensors.items()}
    assert {tensor.device for tensor in found.values()} == {CPU}
    assert ties(model) == ties(expected)
    for name, buffer in expected.named_non_persistent_buffers():
        assert torch.equal(found[name], buffer), name


@pytest.mark.parametrize("family", ALL)
def test_logits_are_finite_and_depend_on_the_prompt(family: str) -> None:
    model = make(family)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]]), use_cache=False).logits.float()
    assert logits.isfinite().all()
    assert logits.std(-1).min() > 0
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("family", ["opt", "mixtral", "deepseek_v3", "gpt_oss", "mamba2"])
def test_values_depend_on_no_order_and_no_place(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "FEW_TOKENS", FEW_TOKENS)
    keeper = Keeper()
    expected, model = make(family), make(family, keeper=keeper)
    for j, layer in enumerate(layers_of(model)):
        keeper.bind(layer, keeper.kept[j])
    few = make_first_layers(SPECS[family].build(), dtype=torch.bfloat16, device=CPU)
    found, first = everything(model), everything(few)
    for name, tensor in everything(expected).items():
        assert torch.equal(found[name], tensor), name
        assert name not in first or torch.equal(first[name], tensor[: len(first[name])] if tensor.dim() else tensor), name
    assert few.config.get_text_config().vocab_size == FEW_TOKENS


def test_matrices_are_normal_and_no_two_rows_are_equal() -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=4096, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2)
    model = make_model(config, dtype=torch.bfloat16, device=CPU)
    tensors = dict(model.named_parameters())
    first, second = (tensors[f"model.layers.{j}.mlp.up_proj.weight"].detach().float() for j in range(2))
    assert first.std().item() == pytest.approx(SCALE, rel=0.01)
    assert abs(first.mean().item()) < 0.01 * SCALE
    rows = torch.nn.functional.normalize(torch.cat([first, second]))
    likeness = (rows @ rows.T).fill_diagonal_(0).abs().max().item()
    assert likeness < 0.15
    assert all(torch.equal(p, torch.ones_like(p)) for name, p in tensors.items() if "norm" in name)


def test_biases_are_zero() -> None:
    model = make("opt")
    biases = [module.bias for module in model.modules() if isinstance(module, nn.Linear) and module.bias is not None]
    assert biases
    assert not any(bias.any() for bias in biases)
