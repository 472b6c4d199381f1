"""Layers that are handed over one by one equal those of `from_pretrained`, to the bit, and so does all that stays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from flexgen_helm.errors import CorruptFile
from flexgen_helm.loading.assembly import LayerKeeper
from flexgen_helm.loading.checkpoint import StoredTensor
from flexgen_helm.loading.read_model import read_model
from flexgen_helm.model.layers import layers_of
from tests.loading.test_read_model import COMPOSITE, CPU, assert_same
from tests.models import save_tiny
from tests.survey.configs import tiny_config
from tests.workbench import Workbench

DENSE = ["llama", "opt", "qwen2", "mistral", "gemma3_text", "gpt2", "gpt_neo", "falcon_h1", "mamba2"]
MIXTURES = ["mixtral", "gpt_oss", "deepseek_v3"]
"""Between them: tied heads, several files, fused experts, transposed matrices, buffers of both kinds, formulas as values."""


class Keeper:
    """Copies what it gets into memory of its own, as a slab does, and leaves the meta device behind."""

    def __init__(self, known: set[int] | None = None) -> None:
        self.known = known or set()
        self.asked: list[int] = []
        self.kept: dict[int, dict[str, Tensor]] = {}

    def has(self, j: int) -> bool:
        self.asked.append(j)
        return j in self.known

    def keep(self, j: int, layer: nn.Module) -> None:
        tensors = layer.state_dict(keep_vars=True)
        assert {tensor.device for tensor in tensors.values()} == {CPU}
        self.kept[j] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.bind(layer, {name: tensor.to("meta") for name, tensor in self.kept[j].items()})

    def bind(self, layer: nn.Module, tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            path, _, name = key.rpartition(".")
            module = layer.get_submodule(path)
            old = getattr(module, name)
            setattr(module, name, nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor)


class Binder(Keeper):
    """Leaves layers bound to its own memory."""

    def keep(self, j: int, layer: nn.Module) -> None:
        super().keep(j, layer)
        self.bind(layer, self.kept[j])


def read(folder: Path, keeper: LayerKeeper, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    return read_model("org/model", folder, config, dtype=dtype, device=CPU, keeper=keeper)


def read_back(folder: Path, keeper: Keeper, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Reads a model and puts back what the keeper took."""
    model = read(folder, keeper, dtype)
    for j, layer in enumerate(layers_of(model)):
        keeper.bind(layer, keeper.kept[j])
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", DENSE + MIXTURES)
def test_kept_layers_equal_from_pretrained(bench: Workbench, family: str, dtype: torch.dtype) -> None:
    folder, keeper = bench.folder(family), Keeper()
    assert_same(read_back(folder, keeper, dtype), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    assert keeper.asked == list(keeper.kept) == list(range(len(keeper.kept)))


@pytest.mark.parametrize("family", ["gpt_neo", "deepseek_v3"])
def test_nothing_is_made_anew_in_bound_layers(bench: Workbench, family: str) -> None:
    folder = bench.folder(family)
    assert_same(read(folder, Binder()), AutoModelForCausalLM.from_pretrained(folder))


def test_only_weights_of_layers_are_left_out(bench: Workbench) -> None:
    model = read(bench.folder("gpt_neo"), Keeper())
    empty = {name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.device.type == "meta"}
    assert empty == {name for name, _ in model.named_parameters() if name.startswith("transformer.h.")}
    assert model.get_buffer("transformer.h.1.attn.attention.bias").any()


def test_what_is_kept_stays_where_the_keeper_has_it(bench: Workbench) -> None:
    """The meta device stands for a GPU: all else is moved to it, buffers of layers that no file holds, too."""
    config = AutoConfig.from_pretrained(bench.folder("gpt_neo"))
    model = read_model(
        "org/model", bench.folder("gpt_neo"), config, dtype=torch.float32, device=torch.device("meta"), keeper=Binder()
    )
    here = {name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.device == CPU}
    assert here == {name for name, _ in model.named_parameters() if name.startswith("transformer.h.")}


def test_composite_model_equals_from_pretrained(tmp_path: Path) -> None:
    torch.manual_seed(5)
    AutoModelForImageTextToText.from_config(COMPOSITE["gemma3"].build()).save_pretrained(tmp_path)
    assert_same(read_back(tmp_path, Keeper()), AutoModelForCausalLM.from_pretrained(tmp_path))


def test_what_the_keeper_has_is_not_read(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    read_names: list[str] = []
    original = StoredTensor.to

    def to(self: StoredTensor, *args: Any, **kwargs: Any) -> Tensor:
        read_names.append(self.name)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StoredTensor, "to", to)
    keeper = Keeper(known={0, 2})
    model = read(bench.folder("deepseek_v3"), keeper)
    files = load_file(bench.folder("deepseek_v3") / "model.safetensors")
    assert sorted(read_names) == sorted(name for name in files if ".layers.0." not in name and ".layers.2." not in name)
    assert list(keeper.kept) == [1]
    assert {parameter.device.type for parameter in layers_of(model)[2].parameters()} == {"meta"}


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_missing_tensor_is_named(bench: Workbench, tmp_path: Path, lost: str) -> None:
    folder = without(bench.folder("llama"), lost, tmp_path)
    with pytest.raises(CorruptFile, match=rf"org/model lack 1 tensors of its config: {lost}\."):
        read(folder, Keeper())


def test_missing_tensor_that_the_library_makes_is_made(tmp_path: Path) -> None:
    """A checkpoint of A.X K1 may lack the routing bias."""
    model = AutoModelForCausalLM.from_config(tiny_config("axk1"))
    model.save_pretrained(tmp_path / "whole")
    name = next(name for name in model.state_dict() if "e_score_correction_bias" in name)
    folder = without(tmp_path / "whole", name, tmp_path)
    assert_same(read_back(folder, Keeper()), AutoModelForCausalLM.from_pretrained(folder))


def test_layers_that_share_weights_are_never_kept_one_by_one(tmp_path: Path) -> None:
    """The plan of memory refuses such a model, with a message for users, before it is loaded."""
    folder = save_tiny("zamba2", tmp_path)
    with pytest.raises(AssertionError):
        read(folder, Keeper())


def without(folder: Path, lost: str, parent: Path) -> Path:
    copied = Path(shutil.copytree(folder, parent / "model"))
    tensors = load_file(copied / "model.safetensors")
    del tensors[lost]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    return copied
