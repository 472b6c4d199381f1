"""The kernel for a GPU is tried with the heads that each kind of layer really has, and serves for all of them or for none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from flexgen_helm.attention.paged.attention import attend_row
from flexgen_helm.attention.paged.trial import HeadShape
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.rows import packed
from flexgen_helm.rows.packed import PackedRows
from flexgen_helm.rows.packed_check import check_packed
from flexgen_helm.types import ResolvedPolicy
from tests.dimensions import MAX_LENGTH
from tests.models import SMALL, save_tiny

POLICY = ResolvedPolicy(gpu_batch_size=16, gpu_batch_tokens=32)
SLIDING, FULL = HeadShape(4, 2, 16, 16), HeadShape(4, 2, 32, 32)


@pytest.fixture(scope="module")
def two_sizes() -> RecordedModel:
    """Gemma 4, whose layers of full attention have larger heads than its config's."""
    torch.manual_seed(0)
    larger: dict[str, Any] = {"global_head_dim": FULL.dim}
    config = Gemma4TextConfig(
        **SMALL,
        **larger,
        head_dim=SLIDING.dim,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=24,
        vocab_size_per_layer_input=SMALL["vocab_size"],
        hidden_size_per_layer_input=8,
    )
    return RecordedModel(AutoModelForCausalLM.from_config(config).eval())


def test_every_size_of_heads_is_tried(two_sizes: RecordedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: set[HeadShape] = set()
    monkeypatch.setattr(packed, "_kernel_for", lambda _, __, shape: tried.add(shape))
    verdict = check_packed(two_sizes, POLICY, max_length=MAX_LENGTH)
    assert tried == set(verdict.heads) == {SLIDING, FULL}


@pytest.mark.parametrize(("refused", "kernel"), [(None, "triton"), (SLIDING, "torch"), (FULL, "torch")])
def test_the_kernel_serves_for_all_sizes_or_for_none(
    refused: HeadShape | None, kernel: str, two_sizes: RecordedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_kernel_for", lambda _, __, shape: None if shape == refused else attend_row)
    rows = PackedRows(two_sizes, PagedCache(), heads=(SLIDING, FULL))
    assert (rows.kernel, rows.heads) == (kernel, (SLIDING, FULL))
    assert set(rows._kernels.values()) == {attend_row if refused is None else None}


def test_values_have_a_size_of_their_own(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny("deepseek_v3", tmp_path)).eval()
    config = model.config
    expected = HeadShape(4, 4, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
    assert check_packed(RecordedModel(model), POLICY, max_length=MAX_LENGTH).heads == (expected,)
