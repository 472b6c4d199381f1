"""Provide configs of well-known models by name, for benchmarks with dummy weights without access to the model hub."""

from __future__ import annotations

from collections.abc import Callable

from transformers import LlamaConfig, OPTConfig, PreTrainedConfig


def _opt(width: int, layers: int, heads: int) -> PreTrainedConfig:
    """Make a config of OPT (Zhang et al. 2022, table 1), published in float16. The 350m variant has another architecture."""
    return OPTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * width,
        word_embed_proj_dim=width,
        dtype="float16",
    )


def _llama2(width: int, layers: int, heads: int, kv_heads: int, inner: int) -> PreTrainedConfig:
    """Make a config of Llama 2 (Touvron et al. 2023)."""
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        dtype="float16",
    )


def _llama3(width: int, layers: int, heads: int, inner: int) -> PreTrainedConfig:
    """Make a config of Llama 3.1 (Grattafiori et al. 2024, table 3)."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        intermediate_size=inner,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=128_000,
        eos_token_id=128_001,
        dtype="bfloat16",
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "facebook/opt-125m": lambda: _opt(768, 12, 12),
    "facebook/opt-1.3b": lambda: _opt(2048, 24, 32),
    "facebook/opt-2.7b": lambda: _opt(2560, 32, 32),
    "facebook/opt-6.7b": lambda: _opt(4096, 32, 32),
    "facebook/opt-13b": lambda: _opt(5120, 40, 40),
    "facebook/opt-30b": lambda: _opt(7168, 48, 56),
    "facebook/opt-66b": lambda: _opt(9216, 64, 72),
    "facebook/opt-175b": lambda: _opt(12288, 96, 96),
    "meta-llama/Llama-2-7b-hf": lambda: _llama2(4096, 32, 32, 32, 11008),
    "meta-llama/Llama-2-13b-hf": lambda: _llama2(5120, 40, 40, 40, 13824),
    "meta-llama/Llama-2-70b-hf": lambda: _llama2(8192, 80, 64, 8, 28672),
    "meta-llama/Llama-3.1-8B": lambda: _llama3(4096, 32, 32, 14336),
    "meta-llama/Llama-3.1-70B": lambda: _llama3(8192, 80, 64, 28672),
    "meta-llama/Llama-3.1-405B": lambda: _llama3(16384, 126, 128, 53248),
}
"""Functions that make a config, by the model's name on the hub."""


def named_config(name: str) -> PreTrainedConfig | None:
    """Return the config of a model, or None if `CONFIGS` has no model of this name.

    Args:
        name: The model's name on the hub, with or without the organization before the slash. Case does not matter.
    """
    for full, make in CONFIGS.items():
        if name.lower() in (full.lower(), full.lower().partition("/")[2]):
            return make()
    return None
