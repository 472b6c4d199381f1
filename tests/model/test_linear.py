"""Linear layers whose products another library computes, and packed weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from flexgen_helm.machine import matmul
from flexgen_helm.machine.matmul import Matmul, onednn_linear
from flexgen_helm.model import linear, recorder
from flexgen_helm.model.linear import (
    OneDNNLinear,
    PackedLinear,
    WidenedConv1D,
    WidenedLinear,
    pack_weights,
    use_matmul,
)
from flexgen_helm.model.recorder import RecordedModel
from tests.models import save_tiny


class Grouped(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def test_only_plain_linear_layers_change_and_they_change_back() -> None:
    model = nn.Sequential(nn.Linear(32, 48), Grouped(48, 32), nn.LayerNorm(32))
    x = torch.randn(16, 32)
    before = model(x)
    use_matmul(model.modules(), "onednn")
    assert [type(module) for module in model] == [OneDNNLinear, Grouped, nn.LayerNorm]
    assert (model(x) - before).abs().max() < 1e-5
    use_matmul(model.modules(), "torch")
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), before)


@torch.inference_mode()
@pytest.mark.parametrize("library", ["widened_torch", "widened_onednn"])
def test_16_bits_are_widened_in_linear_layers_of_both_forms(library: Matmul) -> None:
    plain, conv = nn.Linear(32, 48), Conv1D(40, 48)
    nn.init.normal_(conv.bias)
    model = nn.Sequential(plain, conv, Grouped(40, 32)).bfloat16()
    x = torch.randn(16, 32).bfloat16()
    before = model(x)
    use_matmul(model.modules(), library)
    assert [type(module) for module in model] == [WidenedLinear, WidenedConv1D, Grouped]
    first = (x.float() @ plain.weight.float().T + plain.bias.float()).bfloat16()
    assert (plain(x).float() - first.float()).abs().max() <= first.abs().max() * 2**-8
    second = (first.float() @ conv.weight.float() + conv.bias.float()).bfloat16()
    assert (conv(first).float() - second.float()).abs().max() <= second.abs().max() * 2**-8
    use_matmul(model.modules(), "torch")
    assert [type(module) for module in model] == [nn.Linear, Conv1D, Grouped]
    assert torch.equal(model(x), before)


@torch.inference_mode()
def test_packed_weights_change_no_bit_and_what_others_use_stays() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body, self.head = nn.Embedding(48, 32), nn.Linear(32, 32), nn.Linear(32, 48, bias=False)
            self.head.weight = self.embedding.weight
            self.elsewhere = nn.Linear(32, 32, device="meta")

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(self.body(self.embedding(ids)))
            return result

    model, ids = Model(), torch.arange(16)
    use_matmul(model.modules(), "onednn")
    before, weight = model(ids), model.body.weight
    pack_weights(model.modules(), (16, 64))
    can_pack = all(linear._same_bits(weight, count) for count in (16, 64))
    assert [type(x) for x in (model.body, model.head)] == [PackedLinear if can_pack else OneDNNLinear, OneDNNLinear]
    assert torch.equal(model.body.weight, weight)
    assert model.elsewhere.weight.is_meta
    assert torch.equal(model(ids), before)
    assert sum(parameter.numel() for parameter in model.body.parameters()) == 32 * 33


def test_weights_stay_unpacked_where_a_bit_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    use_matmul(model.modules(), "onednn")
    monkeypatch.setattr(linear, "packed", lambda weight, num_tokens: weight * (1 + 2**-20))
    before = model[0].weight
    pack_weights(model.modules(), (16,))
    assert model[0].weight is before


@pytest.mark.parametrize(("library", "linears"), [("onednn", OneDNNLinear), ("widened_onednn", WidenedLinear)])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_plain_model_multiplies_as_transformers_does(
    family: str, library: Matmul, linears: type[nn.Linear], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model with which a check compares must not share the products that are checked."""
    calls: list[torch.Size] = []

    def counted(*args: torch.Tensor) -> torch.Tensor:
        calls.append(args[1].shape)
        return onednn_linear(*args)

    monkeypatch.setattr(linear, "onednn_linear", counted)
    monkeypatch.setitem(matmul.PRODUCTS, "onednn", counted)
    monkeypatch.setattr(recorder, "faster_matmul", lambda device, dtype: library)
    model = RecordedModel(AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path)).eval())
    with torch.inference_mode(), model.plain() as plain:
        plain(input_ids=torch.arange(10)[None])
    assert not calls
    assert model.matmul == library
    assert {type(module) for module in model.model.modules() if isinstance(module, nn.Linear)} == {linears}
