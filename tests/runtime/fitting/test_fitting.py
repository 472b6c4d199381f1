"""Statistics against hooks on transformers' own forward, packing, and what a killed process finds again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flexgen_helm.compression.matrices import matrix_tensors
from flexgen_helm.compression.scheme import MatrixKey, Parts
from flexgen_helm.errors import CorruptFile, UnsupportedModel
from flexgen_helm.loading.source import ModelSource, open_model
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.slab_folder import SlabFolder
from flexgen_helm.model.experts import sliced_experts
from flexgen_helm.model.layers import layers_of
from flexgen_helm.model.recorder import RecordedModel, Recording
from flexgen_helm.runtime.fitting.fit import fit
from flexgen_helm.runtime.fitting.observation import observed
from flexgen_helm.runtime.fitting.packing import PackingKeeper
from flexgen_helm.runtime.fitting.progress import LayerProgress
from flexgen_helm.runtime.fitting.statistics import observe_model, random_tokens
from tests.workbench import Workbench

CPU = torch.device("cpu")
IDENTITY = {"model": "tiny"}


class Halves:
    """A scheme for tests: values rounded to multiples of a half."""

    needs_statistics = True
    needs_gradients = False

    def observe(self, weight: Tensor, columns: Tensor, rows: Tensor) -> Parts:
        return {"moment": columns, "rows": rows, "largest": weight.abs().amax()}

    def solve(self, observed: Mapping[MatrixKey, Parts], weights: Mapping[MatrixKey, Tensor]) -> dict[MatrixKey, Parts]:
        return {key: {"step": torch.tensor([0.5])} for key in observed}

    def pack(self, weight: Tensor, decided: Parts) -> Parts:
        return {"codes": (weight / decided["step"]).round().to(torch.int16), "step": decided["step"]}

    def unpack(self, stored: Parts, target: Tensor) -> None:
        target.copy_(stored["codes"].float() * stored["step"])


def no_text(_: Path) -> Tensor:
    raise AssertionError("no scheme of these tests needs text")


def _source(bench: Workbench, family: str) -> ModelSource:
    return open_model(str(bench.folder(family)), dtype="float32", device=CPU)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mamba2"])
def test_moments_are_those_of_transformers_own_forward(bench: Workbench, tmp_path: Path, family: str) -> None:
    source = _source(bench, family)
    loaded = source.described(source.read())
    seen: dict[str, list[Tensor]] = defaultdict(list)
    for j, layer in enumerate(layers_of(loaded.model)):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                module.register_forward_pre_hook(lambda _, x, key=f"{j}/{name}.weight/0": seen[key].append(x[0].double()))
    with torch.inference_mode():
        loaded.model(random_tokens(loaded), use_cache=False)
    found = observe_model(source, Halves(), tmp_path)
    assert found.keys() == seen.keys()
    for key, inputs in seen.items():
        expected = torch.cat(inputs).square().flatten(0, -2).mean(0)
        torch.testing.assert_close(found[key]["moment"].double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_moments_of_experts_are_those_of_their_own_tokens(bench: Workbench, family: str) -> None:
    layer = layers_of(_source(bench, family).read())[0]
    tensors = [x for x in matrix_tensors(layer) if "experts" in x.module]
    experts: Any = layer.get_submodule(tensors[0].module)
    generator = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(200, 64, generator=generator), torch.full((200, 2), 0.5)
    # The last expert sees too few tokens for moments of its own.
    chosen = torch.stack([torch.arange(200) % 2, torch.full((200,), 2)], 1)
    chosen[:5, 1] = 3
    with torch.inference_mode(), observed(layer, tensors) as seen:
        sliced_experts(experts, hidden, chosen, weights)
    inputs: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
    with torch.inference_mode():
        for e in range(4):
            own = hidden[(chosen == e).any(1)]
            weight = experts.gate_up_proj[e].T if experts.is_transposed else experts.gate_up_proj[e]
            bias = experts.gate_up_proj_bias[e] if experts.has_bias else None
            inputs["gate_up_proj"].append(own)
            inputs["down_proj"].append(experts._apply_gate(linear(own, weight, bias)))
    for tensor in tensors:
        own = torch.stack([x.double().square().mean(0) for x in inputs[tensor.parameter]])
        own[3] = torch.cat(inputs[tensor.parameter]).double().square().mean(0)
        torch.testing.assert_close(seen[tensor.name].moments.double(), own, rtol=1e-4, atol=1e-7)


def test_slabs_hold_what_was_packed_and_other_tensors_as_they_are(bench: Workbench, tmp_path: Path) -> None:
    source = _source(bench, "gpt_oss")
    whole, fitted = source.read(), fit(source, Halves(), tmp_path, IDENTITY, no_text)
    for j, layer in enumerate(layers_of(whole)):
        form = fitted.formats[j]
        stored, bound = allocate(form.stored.num_bytes), allocate(form.bound.num_bytes)
        fitted.slabs.read(j, stored).result()
        form.load(stored, bound)
        quantised = {tensor.name for tensor in matrix_tensors(layer)}
        for place in form.bound.tensors:
            value = layer.state_dict()[place.names[0]]
            expected = (value * 2).round() / 2 if place.names[0] in quantised else value
            assert torch.equal(place.view(bound), expected), place.names
    fitted.slabs.close()


def test_a_killed_process_goes_on_where_it_was(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(bench, "llama")
    whole = fit(source, Halves(), tmp_path / "whole", IDENTITY, no_text)
    computed: list[int] = []
    replay = RecordedModel.replay

    def until(limit: int) -> Any:
        def counted(self: RecordedModel, j: int, recording: Recording) -> None:
            if len(computed) == limit:
                raise KeyboardInterrupt
            computed.append(j)
            replay(self, j, recording)

        return counted

    monkeypatch.setattr(RecordedModel, "replay", until(6))  # four rows of the first layer, two of the second
    with pytest.raises(KeyboardInterrupt):
        fit(source, Halves(), tmp_path / "killed", IDENTITY, no_text)
    computed.clear()
    monkeypatch.setattr(RecordedModel, "replay", until(100))
    keep = PackingKeeper.keep

    def first_only(self: PackingKeeper, j: int, layer: nn.Module) -> None:
        if j == 1:
            raise KeyboardInterrupt
        keep(self, j, layer)

    monkeypatch.setattr(PackingKeeper, "keep", first_only)
    with pytest.raises(KeyboardInterrupt):
        fit(source, Halves(), tmp_path / "killed", IDENTITY, no_text)
    assert computed == [1, 1, 1, 1]
    packed: list[int] = []

    def noted(self: PackingKeeper, j: int, layer: nn.Module) -> None:
        packed.append(j)
        keep(self, j, layer)

    monkeypatch.setattr(PackingKeeper, "keep", noted)
    again = fit(source, Halves(), tmp_path / "killed", IDENTITY, no_text)
    assert packed == [1]
    assert again.decisions == whole.decisions
    for file in (tmp_path / "whole").glob("*.slab"):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()
    whole.slabs.close()
    again.slabs.close()


def test_what_is_damaged_is_said(bench: Workbench, tmp_path: Path) -> None:
    source = _source(bench, "llama")
    fit(source, Halves(), tmp_path, IDENTITY, no_text).slabs.close()
    with pytest.raises(CorruptFile, match="holds slabs of model tiny"):
        fit(source, Halves(), tmp_path, {"model": "another"}, no_text)
    (tmp_path / "fit" / "decisions.safetensors").write_bytes(b"torn")
    with pytest.raises(CorruptFile, match=r"Delete the folder .* it is made again"):
        fit(source, Halves(), tmp_path, IDENTITY, no_text)


def test_statistics_of_another_model_are_never_used(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: PackingKeeper, j: int, layer: nn.Module) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PackingKeeper, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(_source(bench, "llama"), Halves(), tmp_path, IDENTITY, no_text)
    (tmp_path / "slabs.json").unlink()  # killed even before it was written
    with pytest.raises(CorruptFile, match="holds slabs of model tiny, not of model another"):
        fit(_source(bench, "llama"), Halves(), tmp_path, {"model": "another"}, no_text)


def test_infinite_weights_are_refused_by_name(bench: Workbench, tmp_path: Path) -> None:
    layer = layers_of(_source(bench, "llama").read())[0]
    layer.get_parameter("mlp.up_proj.weight").data[0, 0] = torch.inf
    decided: dict[str, Parts] = defaultdict(lambda: {"step": torch.ones(1)})
    keeper = PackingKeeper(SlabFolder(tmp_path, IDENTITY, {}), [], Halves(), decided, LayerProgress("", 1))
    with pytest.raises(UnsupportedModel, match=r"mlp\.up_proj\.weight of layer 0 holds infinities"):
        keeper.keep(0, layer)
