"""While a model is loaded, memory holds the model and its largest layer at most, measured in a process of its own.

What is measured is the peak of resident memory (VmHWM): the process's own pages, and those of files that it maps. Nothing
is mapped here. The kernel's cache of the files that are read is not the process's and not counted. `from_pretrained`
of transformers 5.23 needs up to six layers more than the model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import GLOBAL_WORKERS

from flexgen_helm.loading.checkpoint import PIECE_BYTES
from tests.workbench import Workbench

MEASURE = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoConfig
from flexgen_helm.loading.read_model import read_model

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

class Dropping:
    def has(self, j):
        return False

    def keep(self, j, layer):
        layer.to("meta")

def load(folder, device="cpu", keeper=None):
    config = AutoConfig.from_pretrained(folder)
    Path("/proc/self/clear_refs").write_text("5")  # Starts the peak anew.
    before = status("VmRSS")
    model = read_model("org/model", Path(folder), config, dtype=torch.float32, device=torch.device(device), keeper=keeper)
    return model, status("VmHWM") - before

warm, large, device, kept = sys.argv[1:]
load(warm)
fixed = load(warm)[1]
model, peak = load(large, device, Dropping() if kept == "True" else None)
layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.get_decoder().layers]
total = sum(p.nbytes for p in model.parameters())
print(json.dumps({"peak": peak, "model": total, "layers": sum(layers), "layer": max(layers), "fixed": fixed}))
"""
MIXTURE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "few large experts": ("MixtralConfig", MIXTURE | {"intermediate_size": 512, "num_local_experts": 8}),
    "many small experts": ("Qwen3MoeConfig", MIXTURE | {"moe_intermediate_size": 64, "num_experts": 128, "head_dim": 64}),
    "large vocabulary": (
        "LlamaConfig",
        MIXTURE | {"vocab_size": 60_000, "intermediate_size": 512, "num_hidden_layers": 2, "tie_word_embeddings": False},
    ),
}


@dataclass(frozen=True)
class Measured:
    """What loading took, in bytes."""

    peak: int
    """Most resident memory, above that before."""
    model: int
    layers: int
    """Of the model, all together."""
    layer: int
    """The largest."""
    fixed: int
    """The peak of loading a model with next to no weights: configuration, modules, headers."""


def measure(warm: Path, folder: Path, device: str = "cpu", *, dropping: bool = False) -> Measured:
    command = [sys.executable, "-c", MEASURE, str(warm), str(folder), device, str(dropping)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return Measured(**json.loads(result.stdout.splitlines()[-1]))


def save(kind: str, stored: torch.dtype, folder: Path) -> None:
    name, fields = MODELS[kind]
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**fields), dtype=stored)
    model.save_pretrained(folder, max_shard_size="10MB")
    assert len(list(folder.glob("*.safetensors"))) > 2


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("few large experts", torch.bfloat16),
        pytest.param("few large experts", torch.float32, marks=slow),
        pytest.param("many small experts", torch.bfloat16, marks=slow),
        pytest.param("many small experts", torch.float32, marks=slow),
        pytest.param("large vocabulary", torch.bfloat16, marks=slow),
        pytest.param("large vocabulary", torch.float32, marks=slow),
    ],
)
def test_peak_is_the_model_and_its_largest_layer(bench: Workbench, tmp_path: Path, kind: str, stored: torch.dtype) -> None:
    save(kind, stored, tmp_path)
    found = measure(bench.folder("mixtral"), tmp_path)
    excess = found.peak - found.model
    print(
        f"\n{kind} stored as {stored}: model {found.model / 2**20:.1f} MiB, largest layer {found.layer / 2**20:.1f} MiB, "
        f"peak {found.peak / 2**20:.1f} MiB: {excess / 2**20:.1f} MiB above the model, {excess / found.layer:.2f} layers "
        f"(next to no weights: {found.fixed / 2**20:.1f} MiB)"
    )
    assert found.fixed < 4 * 2**20
    assert excess <= found.layer + found.fixed
    assert found.peak > 0.95 * found.model


@slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_for_another_device_is_never_held_here(bench: Workbench, tmp_path: Path, kind: str) -> None:
    """The meta device stands for a GPU. On their way are at most two layers, or one matrix outside of layers, and a piece in
    the file's dtype for each thread of the library that reads."""
    save(kind, torch.bfloat16, tmp_path)
    found = measure(bench.folder("mixtral"), tmp_path, "meta")
    way = max(2 * found.layer, 4 * MODELS[kind][1]["vocab_size"] * MODELS[kind][1]["hidden_size"])
    print(
        f"\n{kind}: peak {found.peak / 2**20:.1f} MiB, model {found.model / 2**20:.1f}, largest layer {found.layer / 2**20:.1f}"
    )
    assert found.peak <= way + found.fixed + GLOBAL_WORKERS * PIECE_BYTES


@slow
@pytest.mark.parametrize("kind", ["few large experts", "large vocabulary"])
def test_layers_that_are_handed_over_are_never_held_together(bench: Workbench, tmp_path: Path, kind: str) -> None:
    """A layer is made of another one's worth of tensors, whose pieces are read by the threads of the library."""
    save(kind, torch.bfloat16, tmp_path)
    found = measure(bench.folder("mixtral"), tmp_path, dropping=True)
    outside = found.model - found.layers
    print(
        f"\n{kind}: outside {outside / 2**20:.1f} MiB, largest layer {found.layer / 2**20:.1f}, peak {found.peak / 2**20:.1f}, "
        f"model {found.model / 2**20:.1f}"
    )
    assert found.peak <= outside + 2 * found.layer + found.fixed + GLOBAL_WORKERS * PIECE_BYTES
