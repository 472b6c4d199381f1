"""The profile of this machine: measured once, kept, measured again where it would not hold; and the command that shows it."""

from __future__ import annotations

import errno
import fcntl
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from flexgen_helm.cli import main
from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.loading.source import open_dummy
from flexgen_helm.machine import rates
from flexgen_helm.machine.profile import LayerTime, MachineProfile
from flexgen_helm.machine.profile_file import named_profile, read_profile
from flexgen_helm.memory.device import CPU
from flexgen_helm.model.compiled.layers import CompiledLayers
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.runtime.planning import machine_profile as module
from flexgen_helm.runtime.planning.machine_profile import Subject, machine_profile
from flexgen_helm.runtime.precise_products import PRECISE_PRODUCTS
from flexgen_helm.types import Policy

LAPTOP = named_profile("laptop-8gib")
LAYER = LayerTime("m", "float32", "decode", 64, 2e-3, 0.25, packed=True)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is measured, in its order; nothing is. The cache folder is empty."""
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path / "cache"))
    calls: list[str] = []

    def measure_machine(device: object, folder: Path, say: Callable[[str], None]) -> MachineProfile:
        calls.append("machine")
        return LAPTOP

    def measure_subject(
        machine: MachineProfile, device: object, subject: Subject, say: Callable[[str], None]
    ) -> MachineProfile:
        calls.append(subject.signature)
        return replace(machine, layers=(replace(LAYER, compiled=subject.compiled),))

    monkeypatch.setattr(module, "_measure_machine", measure_machine)
    monkeypatch.setattr(module, "_measure_subject", measure_subject)
    return calls


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder with a config and nothing else."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaConfig(num_hidden_layers=2, vocab_size=300, **sizes).save_pretrained(tmp_path / "model")  # type: ignore[arg-type]
    return tmp_path / "model"


def test_a_machine_is_measured_once_and_says_so(measured: list[str]) -> None:
    said: list[str] = []
    assert [machine_profile(CPU, say=said.append) for _ in range(2)] == [LAPTOP] * 2
    assert measured == ["machine"]
    assert said == ["measuring this machine, once: it takes up to a minute"]
    machine_profile(CPU, again=True)
    assert measured == ["machine"] * 2


def test_one_measures_while_the_other_waits(measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waits, measures = threading.Event(), threading.Event()

    def measure_slowly(*others: object) -> MachineProfile:
        measured.append("machine")
        measures.set()
        assert waits.wait(60)
        return LAPTOP

    def say(text: str) -> None:
        said.append(text)
        waits.set()

    monkeypatch.setattr(module, "_measure_machine", measure_slowly)
    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(machine_profile, CPU)
        assert measures.wait(60)
        assert machine_profile(CPU, say=say) == first.result() == LAPTOP
    (lock,) = (tmp_path / "cache" / "profiles").glob("*.lock")
    assert said == [f"waiting for another process, which measures this machine ({lock})"]
    assert measured == ["machine"]


def test_a_folder_without_locks_costs_a_measurement_and_no_more(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*others: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert machine_profile(CPU) == LAPTOP


def test_another_machine_threads_or_a_torn_file_are_measured_again(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine_profile(CPU)
    (kept,) = (tmp_path / "cache" / "profiles").glob("*.json")
    kept.write_text(kept.read_text()[:-9])
    machine_profile(CPU)
    assert len(measured) == 2
    monkeypatch.setattr(module, "machine_identity", lambda device: {"threads": 64})
    machine_profile(CPU)
    assert len(measured) == 3
    monkeypatch.setattr(module, "PROFILE_VERSION", module.PROFILE_VERSION + 1)
    machine_profile(CPU)
    assert len(measured) == 4


def test_a_model_is_measured_once_for_its_sizes_dtype_and_rows(measured: list[str], config: Path) -> None:
    def profile(dtype: str = "float32", size: int = 16, *, compiled: bool = False) -> MachineProfile:
        source = open_dummy(str(config), dtype=dtype, device=torch.device("cpu"))
        policy = resolved(Policy(gpu_batch_size=size, gpu_batch_tokens=64), CPU)
        return machine_profile(CPU, subject=Subject(source, policy, compiled))

    assert [profile().layers for _ in range(2)] == [(LAYER,)] * 2
    assert len(measured) == 2  # the machine, and the model on it
    profile("bfloat16")
    profile(size=32)
    assert len(measured) == 4
    assert profile(compiled=True).layers == (replace(LAYER, compiled=True),)
    assert len(measured) == 5
    assert machine_profile(CPU).layers == ()


@pytest.mark.parametrize("compiler", ["none", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_real_layer_is_measured_and_what_cannot_be_packed_is_left_out(
    measured: list[str], config: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    """Without a compiler the pieces of a compiled layer run as torch runs them, through the same program."""
    monkeypatch.undo()
    monkeypatch.setitem(rates.READ_BYTES, "cpu", 2**18)
    if compiler == "none":
        monkeypatch.setattr(module, "by_inductor", lambda: CompiledLayers(lambda graph: graph.forward))
    monkeypatch.setattr(module, "measure_model", lambda machine, *others: machine)
    source = open_dummy(str(config), dtype="float32", device=torch.device("cpu"))
    subject = Subject(source, resolved(Policy(gpu_batch_size=16, gpu_batch_tokens=16), CPU))
    said: list[str] = []
    layers = module._measure_subject(LAPTOP, CPU, subject, said.append).layers
    assert {(layer.model, layer.kind, layer.tokens) for layer in layers} == {
        (subject.signature, "prefill", 16),
        (subject.signature, "decode", 16),
    }

    with PRECISE_PRODUCTS.hold():
        compiled = module._measure_subject(LAPTOP, CPU, replace(subject, compiled=True), said.append)
    assert all(layer.compiled for layer in compiled.layers)
    assert compiled.with_layers(compiled=False).layers == ()
    assert compiled.with_layers(compiled=True) == compiled

    def refuse(*others: object, **options: object) -> list[LayerTime]:
        raise UnsupportedModel("it keeps state")

    monkeypatch.setattr(module, "dummy_layers", refuse)
    assert module._measure_subject(LAPTOP, CPU, subject, said.append).layers == ()
    assert said[-1] == "its layers are not measured, because in packed rows it keeps state"


def test_the_command_prints_a_table_and_writes_a_file(
    measured: list[str], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = ["--model", str(config), "--device", "cpu", "--offload-folder", str(tmp_path / "disk"), "--out", str(out)]
    assert main(["profile", *arguments]) == 0
    table, progress = capsys.readouterr()
    lines = table.splitlines()
    assert lines[0].startswith("laptop-8gib, 4 threads: A laptop with 8 GiB")
    assert lines[0].endswith("2026-11-29")
    assert lines[1] == "memory: device 8.00 GiB, host 8.00 GiB, disk 465.66 GiB"
    assert "products, float32, 512 tokens 240.00 GFLOP/s 0%" in [" ".join(line.split()) for line in lines]
    assert "layer m, float32, decode row of 64, packed 2.00 ms 25%" in [" ".join(line.split()) for line in lines]
    assert progress.splitlines()[0].startswith("measuring this machine, once")
    assert read_profile(out).layers == (LAYER,)
    assert (tmp_path / "disk").is_dir()
    assert main(["profile", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "laptop-8gib"
    assert measured.count("machine") == 2  # the command measures anew


def test_the_command_says_what_it_cannot_use(measured: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["profile", "--device", "cpu", "--offload-folder", str(tmp_path / "file" / "disk")]) == 2
    assert "cannot be created" in capsys.readouterr().err
    assert main(["profile", "--device", "cpu", "--out", str(tmp_path / "file" / "out.json")]) == 2
    assert "The profile cannot be written" in capsys.readouterr().err
    assert main(["profile", "--device", "cpu", "--compile-layers"]) == 2
    assert "Give --model M too" in capsys.readouterr().err
    assert main(["profile", "--device", "cpu", "--model", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err
