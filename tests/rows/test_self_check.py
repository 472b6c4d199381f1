"""The self-check sees what it is for: answers that depend on neighbours, by a bit or by much."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from flexgen_helm import Engine, UnsupportedModel
from flexgen_helm.attention import row
from flexgen_helm.attention.kernels import Merged, merge_chunks
from flexgen_helm.attention.paged.trial import HeadShape
from flexgen_helm.errors import OutOfSpace
from flexgen_helm.loading import assembly
from flexgen_helm.loading.assembly import cut_to_first_layers, empty_model
from flexgen_helm.loading.read_model import read_first_layers
from flexgen_helm.loading.source import open_model
from flexgen_helm.model.layers import layer_kinds, layers_of, num_layers_of_every_kind
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.policy import working_memory
from flexgen_helm.rows import packed_check, self_check
from flexgen_helm.rows.choice import check_model
from flexgen_helm.types import ResolvedPolicy
from tests.models import save_tiny
from tests.survey.configs import tiny_config

POLICY = ResolvedPolicy(gpu_batch_size=16, num_gpu_batches=1, gpu_batch_tokens=64)


def load(folder: Path) -> bool | None:
    with Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY, rows="packed") as engine:
        return engine.self_check.bit_stable


@pytest.fixture
def neighbours_leak(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Attention that moves with the number of chunks that its row attends to."""
    share: float = request.param

    def leaking(before: Merged | None, outputs: Tensor, lse: Tensor) -> Merged:
        merged = merge_chunks(before, outputs, lse)
        return merged._replace(total=merged.total * (1 + share * lse.isfinite().sum()))

    monkeypatch.setattr(row, "merge_chunks", leaking)


def test_an_honest_model_is_stable(tmp_path: Path) -> None:
    assert load(save_tiny("llama", tmp_path))


@pytest.mark.parametrize("neighbours_leak", [1e-8], indirect=True)
def test_a_last_bit_that_moves_is_noticed(tmp_path: Path, neighbours_leak: None) -> None:
    assert not load(save_tiny("llama", tmp_path))


@pytest.mark.parametrize("neighbours_leak", [1e-2], indirect=True)
def test_an_answer_that_moves_is_refused(tmp_path: Path, neighbours_leak: None) -> None:
    with pytest.raises(UnsupportedModel, match="differ from transformers' own forward"):
        load(save_tiny("llama", tmp_path))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), MemoryError()]
)
def test_a_lack_of_memory_is_no_property_of_the_model(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starving(*args: object) -> bool:
        raise error

    monkeypatch.setattr(packed_check, "_bit_stable", starving)
    with pytest.raises(OutOfSpace, match="self-check needs more memory"):
        Engine.from_pretrained(str(save_tiny("llama", tmp_path)), dtype="float32", device="cpu", policy=POLICY)


@pytest.mark.parametrize(
    ("kind", "changes", "count"),
    [
        ("llama", {}, 2),
        ("gemma2", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 5}, 4),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0] * 2, "layer_types": ["full_attention"] * 8}, 4),
        ("gpt2", {}, 2),
        # What the model reads from its config while it runs, so that no layer shows it.
        ("llama", {"of_each_layer": [0, 0, 0, 1] * 2}, 4),
    ],
)
def test_first_layers_hold_one_of_every_kind(kind: str, changes: dict[str, Any], count: int) -> None:
    config = AutoConfig.for_model(kind, num_hidden_layers=8, **changes)
    model = empty_model("", config, torch.float32)
    kinds = layer_kinds(model, layers_of(model))
    assert num_layers_of_every_kind(model, layers_of(model)) == count
    assert [kinds[j] for j in sorted(set(kinds))] == sorted(set(kinds))
    cut_to_first_layers(model)
    assert len(layers_of(model)) == num_layers_of_every_kind(model, layers_of(model)) == count
    assert layer_kinds(model, layers_of(model)) == kinds[:count]


def test_16_bits_are_compared_in_fp32_without_a_copy_of_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[torch.dtype, int]] = []
    difference = packed_check._difference

    def noted(model: RecordedModel, *arguments: Any) -> tuple[float, tuple[HeadShape, ...]]:
        compared.append((model.model.dtype, model.model.config.vocab_size))
        return difference(model, *arguments)

    monkeypatch.setattr(packed_check, "_difference", noted)
    monkeypatch.setattr(assembly, "FEW_TOKENS", 64)
    folder = str(save_tiny("llama", tmp_path))
    with Engine.from_pretrained(folder, dtype="bfloat16", device="cpu", policy=POLICY, recheck=True) as engine:
        assert engine.vocab_size > 64
    assert compared == [(torch.float32, 64)]


def test_positions_whose_logprobs_are_planned() -> None:
    positions = sum(len(self_check.compared(length)) for length, _ in packed_check.LONG_CUTS)
    assert 2 * positions == working_memory.CHECKED_POSITIONS  # packed and alone


DEEP: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2, "num_hidden_layers": 6},
    # K and V of other shapes in the layers of full attention.
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_hidden_layers": 6},
    "deepseek_v3": {"num_hidden_layers": 5},
    "jamba": {"num_hidden_layers": 8},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 4, "num_hidden_layers": 8},
}


FAST = {
    ("gemma4_text", torch.bfloat16),
    ("deepseek_v3", torch.float32),
    ("jamba", torch.bfloat16),
    ("qwen3_next", torch.float32),
}
CASES = [
    pytest.param(kind, dtype, marks=() if (kind, dtype) in FAST else pytest.mark.slow)
    for kind in DEEP
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
def test_verdict_on_first_layers_is_that_on_all(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = tiny_config(kind, DEEP[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    source = open_model(str(tmp_path), dtype=str(dtype).removeprefix("torch."), device=torch.device("cpu"))
    expected = check_model(source.load(), POLICY, "auto").passed
    few = read_first_layers("org/model", tmp_path, config, device=torch.device("cpu"), dtype=dtype)
    found = check_model(replace(source.load(), model=few), POLICY, "auto").passed
    whole = empty_model("", config, dtype)
    verdict = found.verdict.of_all_layers(layer_kinds(whole, layers_of(whole)))
    assert (found.kind, verdict.layers) == (expected.kind, expected.verdict.layers)
    assert len(found.verdict.layers) < len(verdict.layers) == len(layers_of(whole))
    assert verdict.cache_bytes_per_token > 0
