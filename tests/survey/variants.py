"""What matters as much as a type: windows, kinds of rotary embedding, mixtures, sparse settings, where heads and biases are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.dimensions import MAX_LENGTH, WINDOW
from tests.models import HALF, LONGROPE_LENGTH

LONGROPE_SURVEY_LENGTH = 8 * LONGROPE_LENGTH
"""Original length of models with longrope, in tokens: no job of the survey is longer."""


@dataclass(frozen=True)
class Variant:
    """A type with other settings than its tiny default."""

    kind: str
    changes: dict[str, Any]


def _rope(rope_type: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **fields}}


_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=MAX_LENGTH // 4, beta_fast=32.0, beta_slow=1.0)
_LONGROPE = {
    "original_max_position_embeddings": LONGROPE_SURVEY_LENGTH,
    **_rope(
        "longrope",
        short_factor=[1.0] * 8,
        long_factor=HALF,
        original_max_position_embeddings=LONGROPE_SURVEY_LENGTH,
    ),
}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_MIXED_ON = {**_MIXED, "use_sliding_window": True, "max_window_layers": 0}
_FULL = {"layer_types": ["full_attention"] * 4}
_SPARSE = {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2}
_GEMMA4_MIXTURE = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}

VARIANTS: dict[str, Variant] = {
    f"{kind}+{label}": Variant(kind, changes)
    for kind, label, changes in (
        ("cohere", "query and key norms", {"use_qk_norm": True}),
        ("deepseek_v2", "greedy routing", {"topk_method": "greedy"}),
        ("deepseek_v3", "yarn", _YARN),
        ("deepseek_v3", "queries of full rank", {"q_lora_rank": None}),
        ("deepseek_v32", "index that keeps all", {"index_topk": MAX_LENGTH}),
        ("dots1", "mixed windows", _MIXED),
        ("exaone4", "full attention", _FULL),
        ("falcon", "alibi", {"alibi": True, "new_decoder_architecture": False}),
        ("falcon", "new architecture", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("gemma2", "low softcaps", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0}),
        ("gemma3_text", "full attention", _FULL),
        ("gemma3n_text", "no shared K and V", {"num_kv_shared_layers": 0}),
        ("gemma4_text", "mixture of experts", _GEMMA4_MIXTURE),
        ("gemma4_text", "shared K and V", {"num_kv_shared_layers": 2}),
        ("gemma4_text", "keys are values", {"attention_k_eq_v": True}),
        ("glm4_moe", "query and key norms", {"use_qk_norm": True}),
        ("gpt2", "scaled by layer", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt_bigcode", "many key heads", {"multi_query": False}),
        ("gpt_neox", "serial residual", {"use_parallel_residual": False}),
        ("gpt_oss", "plain rope", _rope("default")),
        (
            "granite",
            "multipliers",
            {"embedding_multiplier": 6.0, "logits_scaling": 0.5, "residual_multiplier": 0.4, "attention_multiplier": 0.2},
        ),
        ("llama", "linear", _rope("linear", factor=4.0)),
        ("llama", "dynamic", _rope("dynamic", factor=4.0)),
        ("llama", "yarn", _YARN),
        ("llama", "longrope", _LONGROPE),
        (
            "llama",
            "llama3",
            _rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=MAX_LENGTH // 4,
            ),
        ),
        ("llama", "biases", {"attention_bias": True, "mlp_bias": True}),
        ("llama4_text", "no temperature", {"attn_temperature_tuning": False}),
        ("llama4_text", "no chunks", {"no_rope_layers": [1] * 4, **_FULL}),
        ("mellum", "mixed windows", _MIXED),
        ("minimax_m3_vl_text", "sparse", _SPARSE),
        ("mistral", "no window", {"sliding_window": None}),
        ("mixtral", "window", {"sliding_window": WINDOW}),
        ("olmo", "clipped projections", {"clip_qkv": 0.5}),
        ("opt", "norm after, projected embeddings", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
        ("phi", "query and key norms", {"qk_layernorm": True}),
        ("phi3", "longrope", _LONGROPE),
        ("phi3", "no window", {"sliding_window": None}),
        ("qwen2", "mixed windows", _MIXED_ON),
        ("qwen2", "yarn", _YARN),
        ("qwen2_moe", "mixed windows", _MIXED_ON),
        ("qwen3", "mixed windows", _MIXED_ON),
        ("qwen3_moe", "sparse and dense layers", {"mlp_only_layers": [0, 2]}),
        ("smollm3", "mixed windows", _MIXED_ON),
        ("stablelm", "parallel residual", {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}),
        ("starcoder2", "window", {"sliding_window": WINDOW}),
        ("zaya", "window", {"sliding_window": WINDOW, "layer_types": ["hybrid", "hybrid_sliding"] * 2}),
    )
}
"""By name, which begins with the type's."""
