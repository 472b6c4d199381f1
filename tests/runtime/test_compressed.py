"""Compressed weights: an engine equals transformers with the same weights unpacked, wherever they are stored."""

from __future__ import annotations

import errno
import functools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flexgen_helm import Engine, Policy
from flexgen_helm.compression.config import parse
from flexgen_helm.compression.matrices import matrix_tensors
from flexgen_helm.compression.schemes import EntropyCoded, scheme_of
from flexgen_helm.errors import CorruptFile, DiskFull, PolicyError
from flexgen_helm.model.layers import layers_of
from flexgen_helm.runtime.fitting import own_text
from tests.jobs import fixed_mix
from tests.reference import Agreement, Reference
from tests.workbench import OWN_MEMORY, POLICY, Workbench

JOBS = fixed_mix(31, 12)
PLACES: dict[str, Policy] = {
    "resident": Policy(),
    "host": Policy(weights=(0, 1, 0)),
    "disk": Policy(weights=(0, 0, 1), overlap=False),
    "packed on the device": Policy(keep_packed=True),
    "three tiers": Policy(weights=(0.4, 0.3, 0.3)),
}


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "ROW_TOKENS", 32)


def _unpacked(source: Path, compressed: Path, variant: str, target: Path) -> Path:
    """Saves transformers' model with each matrix packed and unpacked again."""
    config = parse(variant)
    assert config.bits is not None
    scheme = scheme_of(config.scheme, config.bits)
    unpack = scheme.load if isinstance(scheme, EntropyCoded) else scheme.unpack
    found = load_file(compressed / "fit" / "decisions.safetensors") if scheme.needs_statistics else {}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for j, layer in enumerate(layers_of(model)):
        for tensor in matrix_tensors(layer):
            for i, matrix in enumerate(tensor.matrices(layer.get_parameter(tensor.name).data)):
                key = f"{j}/{tensor.name}/{i}:"
                decided = {name.removeprefix(key): x for name, x in found.items() if name.startswith(key)}
                unpacked = torch.empty(matrix.shape)
                unpack(scheme.pack(matrix.contiguous(), decided), unpacked)
                assert not torch.equal(unpacked, matrix)
                matrix.copy_(unpacked)
    model.save_pretrained(target)
    return target


FAST = {("gpt2", "w4"), ("mixtral", "w4-self")}
"""One of columns in a row, and one of experts."""
CASES = [
    pytest.param(family, variant, marks=() if (family, variant) in FAST else pytest.mark.slow)
    for family in ("llama", "gpt2", "mixtral", "mamba2")
    for variant in ("w4-minmax", "w4", "w4-entropy", "w4-self")
]


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_an_engine_equals_transformers_with_the_unpacked_weights(
    bench: Workbench, tmp_path: Path, family: str, variant: str
) -> None:
    folder, answers = bench.folder(family), {}
    for name, place in PLACES.items():
        policy = replace(place, gpu_batch_size=POLICY.gpu_batch_size, gpu_batch_tokens=POLICY.gpu_batch_tokens)
        device = OWN_MEMORY if name == "three tiers" else "cpu"
        with Engine.from_pretrained(
            str(folder), compression=variant, device=device, policy=policy, offload_folder=tmp_path / "slabs"
        ) as engine:
            answers[name] = engine.run(JOBS)
            assert (engine.stats.busy_seconds.get("unpack", 0) > 0) == (name not in ("resident", "host"))
            assert engine.numerics.weights.scheme == variant
    reference = Reference(_unpacked(folder, tmp_path / "slabs", variant, tmp_path / "unpacked"))
    agreement = Agreement()
    for job, result in zip(JOBS, answers["resident"], strict=True):
        agreement.add(job, result, reference)
    assert not agreement.failures, agreement.failures
    for name in PLACES:
        assert answers[name] == answers["resident"], name


def test_packed_weights_need_a_variant(bench: Workbench) -> None:
    with pytest.raises(PolicyError, match="keep_packed is for compressed weights"):
        Engine.from_pretrained(str(bench.folder("llama")), device="cpu", policy=Policy(keep_packed=True))


def test_slabs_of_another_variant_and_torn_ones_are_said(bench: Workbench, tmp_path: Path) -> None:
    load = functools.partial(Engine.from_pretrained, str(bench.folder("llama")), device="cpu", offload_folder=tmp_path)
    load(compression="w4").close()
    with pytest.raises(CorruptFile, match=r"holds slabs of .*scheme w4,.* not of .*scheme w8,.* Give another offload_folder"):
        load(compression="w8")
    slab = tmp_path / "unit_00001.slab"
    torn = bytearray(slab.read_bytes())
    torn[1000] ^= 1
    slab.write_bytes(torn)
    with pytest.raises(
        CorruptFile, match=r"unit_00001\.slab is not what was written.* delete the file and run the command again"
    ):
        load(compression="w4")
    slab.unlink()
    load(compression="w4").close()
    assert slab.read_bytes() != torn


def test_a_full_disk_is_said_and_what_was_written_is_used(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = functools.partial(Engine.from_pretrained, str(bench.folder("llama")), device="cpu", offload_folder=tmp_path)
    replace_file = os.replace

    def full(source: str, target: str | Path) -> None:
        if Path(target).name == "unit_00001.slab":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(DiskFull, match=r"unit_00001\.slab cannot be written.* Free some space"):
            load(compression="w4-minmax")
    written = (tmp_path / "unit_00000.slab").stat().st_mtime_ns
    load(compression="w4-minmax").close()
    assert (tmp_path / "unit_00000.slab").stat().st_mtime_ns == written
