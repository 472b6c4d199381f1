"""Packing, and what a killed process finds again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from flexgen_helm.compression.matrices import matrix_tensors
from flexgen_helm.compression.scheme import MatrixKey, Parts
from flexgen_helm.compression.sensitivity import Sensitivity
from flexgen_helm.errors import CorruptFile, UnsupportedModel
from flexgen_helm.loading.source import ModelSource, open_model
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.slab_folder import TEMPORARY, SlabFolder
from flexgen_helm.model.layers import layers_of
from flexgen_helm.model.recorder import RecordedModel, Recording
from flexgen_helm.runtime.fitting.files import load_checked, save_checked
from flexgen_helm.runtime.fitting.fit import fit
from flexgen_helm.runtime.fitting.packing import PackingKeeper
from flexgen_helm.runtime.fitting.progress import LayerProgress
from tests.workbench import Workbench

CPU = torch.device("cpu")
IDENTITY = {"model": "tiny"}


class Halves:
    """A scheme for tests: values rounded to multiples of a half."""

    needs_statistics = True
    own_text = False

    def observe(self, weight: Tensor, known: Sensitivity) -> Parts:
        return {"columns": known.columns, "rows": known.rows, "largest": weight.abs().amax()}

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


def test_what_was_found_so_far_is_not_believed_where_a_byte_has_changed(tmp_path: Path) -> None:
    file, tensors = tmp_path / "layer.safetensors", {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    save_checked(file, tensors)
    whole = file.read_bytes()
    assert all(torch.equal(x, tensors[name]) for name, x in load_checked(file).items())
    damaged = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    for content in (*damaged, *(whole[:at] for at in range(0, len(whole), 5)), save(tensors)):
        file.write_bytes(content)
        with pytest.raises(CorruptFile, match=r"layer\.safetensors cannot be read"):
            load_checked(file)


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
    half_written = [tmp_path / "killed" / folder / f"{TEMPORARY}x" for folder in (".", "fit", "fit/statistics")]
    for path in half_written:
        path.write_bytes(b"half")
    again = fit(source, Halves(), tmp_path / "killed", IDENTITY, no_text)
    assert packed == [1]
    assert not any(path.exists() for path in half_written)
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
