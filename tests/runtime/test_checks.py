"""The self-check sees what it is for: answers that depend on neighbours, by a bit or by much."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from flexgen_helm import Engine, Policy, UnsupportedModel
from flexgen_helm.attention import row
from flexgen_helm.attention.kernels import merge_chunks
from tests.models import save_tiny

POLICY = Policy(gpu_batch_size=16, num_gpu_batches=1, gpu_batch_tokens=64)


def load(folder: Path) -> bool:
    with Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY, rows="packed") as engine:
        return engine.verdict.bit_stable


@pytest.fixture
def neighbours_leak(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Attention that moves with the number of chunks that its row attends to."""
    share: float = request.param

    def leaking(outputs: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
        return merge_chunks(outputs, lse, sinks) * (1 + share * lse.isfinite().sum())

    monkeypatch.setattr(row, "merge_chunks", leaking)


def test_an_honest_model_is_stable(tmp_path: Path) -> None:
    assert load(save_tiny("llama", tmp_path))


@pytest.mark.parametrize("neighbours_leak", [1e-8], indirect=True)
def test_a_last_bit_that_moves_is_noticed(tmp_path: Path, neighbours_leak: None) -> None:
    assert not load(save_tiny("llama", tmp_path))


@pytest.mark.parametrize("neighbours_leak", [1e-2], indirect=True)
def test_an_answer_that_moves_is_refused(tmp_path: Path, neighbours_leak: None) -> None:
    with pytest.raises(UnsupportedModel, match="differ from the library's own forward"):
        load(save_tiny("llama", tmp_path))
