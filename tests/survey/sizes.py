"""The small values: by field name for all types, and what single types need beside them."""

from __future__ import annotations

from typing import Any

from tests.dimensions import MAX_LENGTH, VOCAB_SIZE, WINDOW

LAYERS = 4
TOWER_LAYERS = 3
"""Of vision and audio towers: another number, since layers are found by theirs."""
HIDDEN = 64
HEADS = 4
HEAD_DIM = HIDDEN // HEADS


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_each(LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks"),
    **_each(LAYERS, "encoder_layers num_encoder_layers"),
    **_each(2, "depth num_global_layers"),
    **_each(HIDDEN, "hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim embedding_size lru_width"),
    **_each(HIDDEN, "input_embedding_size output_embedding_size attention_hidden_size hidden_size_global"),
    **_each(HIDDEN, "out_hidden_size adapter_out_dim adapter_in_dim adapter_input_size"),
    **_each(96, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff n_inner ffn_hidden_size mlp_dim"),
    **_each(96, "intermediate_size_mlp dense_intermediate_size feed_forward_size d_ff dim_ff"),
    **_each(32, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size"),
    **_each(32, "moe_shared_expert_intermediate_size shared_experts_intermediate_size prefix_dense_intermediate_size"),
    **_each(HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    **_each(HEADS, "attention_heads swa_num_attention_heads num_query_groups"),
    **_each(2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads"),
    **_each(HEAD_DIM, "head_dim swa_head_dim attention_head_dim attention_head_size kv_channels d_kv d_head dim_head"),
    **_each(HEAD_DIM, "global_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim"),
    **_each(2, "linear_num_key_heads"),
    **_each(HEADS, "linear_num_value_heads linear_num_heads"),
    **_each(8, "rotary_dim qk_rope_head_dim"),
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "v_head_dim": 12,
    "logit_scale": 0.5,
    "query_pre_attn_scalar": 16,
    "q_lora_rank": 24,
    **_each(16, "kv_lora_rank o_lora_rank laurel_rank d_rel gated_norm_rank adapter_rank hc_lowrank"),
    **_each(VOCAB_SIZE, "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    **_each(MAX_LENGTH, "max_position_embeddings n_positions n_ctx max_seq_len seq_length model_max_length context_length"),
    **_each(MAX_LENGTH, "max_target_positions"),
    **_each(WINDOW, "sliding_window window_size attention_window_size local_attention attention_chunk_size"),
    **_each(WINDOW, "sliding_window_size keep_window_size"),
    **_each(8, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_each(2, "num_experts_per_tok num_experts_per_token moe_k moe_top_k moe_topk top_k_experts"),
    **_each(2, "n_group num_expert_group"),
    **_each(1, "topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers"),
    **_each(8, "index_topk index_block_size"),
    "index_topk_blocks": 2,
    # Scores of an index are sums of positive parts: of few heads, many are zero, and which of them are chosen is arbitrary.
    "index_n_heads": 16,
    **_each(HEAD_DIM, "index_head_dim"),
    **_each(HEAD_DIM, "mamba_d_head mamba_head_dim mamba_headdim"),
    **_each(16, "mamba_d_state ssm_state_size state_size"),
    **_each(8, "mamba_chunk_size chunk_size"),
    **_each(4, "mamba_dt_rank time_step_rank"),
    **_each(HIDDEN, "mamba_d_ssm"),
    **_each(8, "mamba_n_heads mamba_num_heads"),
    **_each(2, "n_groups n_mamba_heads"),
    **_each(32, "image_size"),
    **_each(8, "patch_size"),
    **_each(16, "hidden_size_per_layer_input rel_extent router_hidden_size"),
}
"""Value of a field wherever a configuration has it and its default is not None."""

INDEX_LISTS: dict[str, list[int]] = {
    "mlp_only_layers": [0],
    "cross_attention_layers": [],
}
"""Lists of layer numbers."""

SPECIAL_TOKENS = {"eos_token_id": VOCAB_SIZE - 1, "pad_token_id": 0, "bos_token_id": 1}

FILLED = ("head_dim", "num_key_value_heads", "num_experts_per_tok")
"""Fields that get their small value even where the default is None."""

_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA4 = {"global_head_dim": 32}
_LLAMA4 = {
    "no_rope_layers": [1, 0, 1, 0],
    "layer_types": ["chunked_attention", "full_attention"] * 2,
    "moe_layers": [1, 3],
    "floor_scale": 8,
}
_QSA = {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(_SLIDING_AND_FULL, _ROPE),
        "layer_types": _SLIDING_AND_FULL * 2,
    },
    "cpmant": {"init_std": 0.02},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, "o_groups": 2},
    "deepseek_v2": {"topk_group": 1, "n_group": 2, "topk_method": "group_limited_greedy"},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    "dots3_note_text": {
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{"swa_q_lora_rank": 24, "swa_kv_lora_rank": 16, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 12},
        **{"head_dim": 24, "swa_head_dim": 24, "n_group": 1},
    },
    "falcon_h1": {"mamba_n_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": _SLIDING_AND_FULL * 2, "intermediate_size": 96},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "laguna": {"layer_types": _SLIDING_AND_FULL * 2, "num_attention_heads_per_layer": [4, 8, 4, 8]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": None},
    "llama4_text": _LLAMA4,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 4, "num_layers": 2},
    "mamba2": {"num_heads": 8, "expand": 2},
    "minimax_m3_vl_text": {"index_n_heads": 2},
    "xlm": {"causal": True},
    "minicpm3": {"dim_model_base": HIDDEN, "scale_emb": 2},
    "qwen4_exp_text": _QSA,
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 40), "num_buckets": 4},
    "roc_bert": {"shape_vocab_size": 32, "pronunciation_vocab_size": 32},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type needs beside the sizes."""
