"""What a run is judged by: sizes against the config's own numbers, the bound against its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from flexgen_helm import Engine, Job
from flexgen_helm.runtime.limit import LayerSizes, Rates, layer_sizes, limit_seconds, measure_rates
from flexgen_helm.types import RunStats
from tests.models import save_tiny

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ATTENTION, NORMS = 16 * (16 + 8 + 8 + 16), 2 * 16


def layers_of(config: LlamaConfig | MixtralConfig) -> list[nn.Module]:
    return list(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model.layers)


def test_a_token_meets_every_matrix_of_a_dense_layer() -> None:
    sizes = layer_sizes(layers_of(LlamaConfig(vocab_size=50, **SHAPE)), None)
    matrices = 3 * (ATTENTION + 3 * 16 * 40)
    assert sizes == LayerSizes(num_bytes=2 * (matrices + 3 * NORMS), active_weights=matrices)


def test_a_token_meets_only_its_experts() -> None:
    layers = layers_of(MixtralConfig(vocab_size=50, num_local_experts=4, num_experts_per_tok=2, **SHAPE))
    router, expert = 16 * 4, 3 * 16 * 40
    sizes = layer_sizes(layers, 2)
    assert sizes is not None
    assert sizes.active_weights == 3 * (ATTENTION + router + 2 * expert)
    assert sizes.num_bytes == 2 * 3 * (ATTENTION + NORMS + router + 4 * expert)
    assert layer_sizes(layers, None) is None


def test_the_slower_resource_is_the_limit() -> None:
    sizes, rates = LayerSizes(num_bytes=1000, active_weights=500), Rates(multiply=1e6, read=1e4)
    scoring = RunStats(prompt_tokens_computed=900, generated_tokens=100, sweeps=1)
    decoding = RunStats(generated_tokens=100, sweeps=100)
    assert limit_seconds(scoring, sizes, rates) == 2 * 1000 * 500 / 1e6
    assert limit_seconds(decoding, sizes, rates) == 100 * 1000 / 1e4


def test_rates_are_those_of_a_computer() -> None:
    rates = measure_rates(torch.device("cpu"), torch.float32)
    assert 1e8 < rates.multiply < 1e15
    assert 1e8 < rates.read < 1e13


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_no_run_is_faster_than_its_limit(family: str, tmp_path: Path) -> None:
    with Engine.from_pretrained(str(save_tiny(family, tmp_path))) as engine:
        assert engine.share_of_limit(engine.stats) is None
        engine.run([Job(token_ids=range(3, 40), max_new_tokens=4)])
        share = engine.share_of_limit(engine.stats)
        assert share is not None
        assert 0 < share < 1
        info = engine.describe()
        assert info.bits_per_weight == info.bits_per_cache_element == 32
        assert info.numerics == engine.numerics
        files = sum(path.stat().st_size for path in (tmp_path / family).glob("*.safetensors"))
        assert info.weight_bytes["device"] == pytest.approx(files, rel=0.05)
