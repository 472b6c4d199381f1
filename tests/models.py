"""Tiny random models of many families, saved as folders that ``from_pretrained`` reads.

Windows and chunks are 8 tokens, so that every prompt of a test crosses them. Weights are six times the usual size, so
that what a model predicts depends on the whole prompt, and vectors (norms, biases, sinks) are random, so that
one that is left out shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from tests.dimensions import MAX_LENGTH, VOCAB_SIZE, WINDOW
from tests.survey.configs import tiny_config

LONGROPE_LENGTH = 32
"""Length in tokens up to which the Phi-3 model with longrope uses its short rotary factors."""
HALF = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FOUR_LAYERS = {"num_hidden_layers": 4, "head_dim": 16}
GPT_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_positions": MAX_LENGTH,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}


@dataclass(frozen=True)
class Family:
    """How to build the tiny model of one family."""

    config: str
    """Name of the configuration class in ``transformers``."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields that differ from ``base``; None removes a field."""
    base: dict[str, Any] = field(default_factory=lambda: SMALL)
    factor: ClassVar[float] = 6.0
    """Of the matrices."""

    def build(self) -> PreTrainedConfig:
        """Returns the configuration."""
        fields = {name: value for name, value in {**self.base, **self.overrides}.items() if value is not None}
        make: Callable[..., PreTrainedConfig] = getattr(transformers, self.config)
        return make(**fields)


SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, Family] = {
    "opt": Family("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "llama": Family("LlamaConfig"),
    "qwen2": Family("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3Config", {"head_dim": 32}),
    "mistral": Family("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": Family(
        "Gemma2Config",
        {
            **FOUR_LAYERS,
            "sliding_window": WINDOW,
            "layer_types": SLIDING_AND_FULL,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig",
        {**FOUR_LAYERS, "sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL, "query_pre_attn_scalar": 16},
    ),
    "gpt2": Family("GPT2Config", base=GPT_SMALL),
    "gpt_neox": Family("GPTNeoXConfig"),
    "phi": Family("PhiConfig"),
    "stablelm": Family("StableLmConfig", {"use_qkv_bias": True}),
    "gpt_oss": Family("GptOssConfig", {**FOUR_LAYERS, **MIXTURE, "sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL}),
    "llama4_text": Family(
        "Llama4TextConfig",
        {
            **FOUR_LAYERS,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0, 1, 0],
            "floor_scale": 8,
        },
    ),
    "mixtral": Family("MixtralConfig", {**MIXTURE, "sliding_window": WINDOW}),
    "qwen3_moe": Family(
        "Qwen3MoeConfig", {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    ),
    "olmo2": Family("Olmo2Config"),
    "granite": Family(
        "GraniteConfig",
        {
            "embedding_multiplier": 6.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
        },
    ),
    "starcoder2": Family("Starcoder2Config", {"sliding_window": WINDOW}),
    "phi3": Family("Phi3Config", {"sliding_window": WINDOW}),
    "deepseek_v2": Family("DeepseekV2Config", {**LATENT, "topk_method": "greedy"}),
    "deepseek_v3": Family("DeepseekV3Config", {**LATENT, "n_group": 2, "topk_group": 1, "num_mtp_layers": 0}),
}
"""What the engine must serve."""

LONGROPE = Family(
    "Phi3Config",
    {
        "original_max_position_embeddings": LONGROPE_LENGTH,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": HALF,
            "original_max_position_embeddings": LONGROPE_LENGTH,
        },
    },
)
"""Served while a job stays within ``LONGROPE_LENGTH`` tokens."""


@dataclass(frozen=True)
class SingleFamily:
    """A type that packed rows would compute wrongly: its tiny configuration is the survey's, with layers of every kind."""

    kind: str
    """Name of the type."""
    reason: str
    """Regular expression that the refusal of packed rows must match."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields that differ."""
    factor: float = 6.0
    """Of the matrices: the largest of the survey's under which hidden states stay moderate."""

    def build(self) -> PreTrainedConfig:
        """Returns the configuration."""
        return tiny_config(self.kind, self.changes)


OWN_ATTENTION = "does not call transformers' attention interface"
NO_POSITIONS = "takes no position_ids"
STATE = "keeps state other than K and V"
SINGLE: dict[str, SingleFamily] = {
    family.kind: family
    for family in (
        SingleFamily("falcon", OWN_ATTENTION, {"new_decoder_architecture": True, "num_kv_heads": 2}),
        SingleFamily("gpt_neo", OWN_ATTENTION),
        SingleFamily("granitemoehybrid", STATE),
        SingleFamily("bloom", NO_POSITIONS),
        SingleFamily("mpt", NO_POSITIONS),
        SingleFamily("mamba2", NO_POSITIONS, factor=2.0),
        # Deeper than the others, with layers that return tuples.
        SingleFamily("falcon_h1", STATE, {"num_hidden_layers": 6}),
        SingleFamily("deepseek_v4", STATE),
        SingleFamily("jamba", STATE),
        SingleFamily("kimi_linear", STATE),
        SingleFamily("lfm2", STATE),
        SingleFamily("nemotron_h", STATE),
        SingleFamily("olmo_hybrid", STATE),
        SingleFamily("qwen3_5_text", STATE, factor=4.0),
        SingleFamily("qwen3_next", STATE, factor=4.0),
        SingleFamily("zamba2", STATE),
    )
}
"""What would be silently wrong in packed rows and runs in single ones: own attention code, and state beside attention."""


ENDING = ("llama", "lfm2")
"""Families whose answers often end with an end token, in packed and in single rows."""


def save_tiny(family: str, folder: Path, *, num_layers: int | None = None) -> Path:
    """Saves the tiny model of a family, without a tokenizer.

    Args:
        family: A key of ``FAMILIES`` or ``SINGLE``, or ``"phi3_longrope"``.
        folder: Where the folder ``family`` is made.
        num_layers: Of a family of ``FAMILIES``; None: as many as usual, of which there are few.

    Returns:
        The model folder. Its end token is one that greedy decoding rarely reaches; those of `ENDING` have several that they
        often reach.
    """
    specs: dict[str, Family | SingleFamily] = {**FAMILIES, **SINGLE, "phi3_longrope": LONGROPE}
    spec = specs[family]
    if num_layers is not None:
        assert isinstance(spec, Family)
        spec = replace(spec, overrides={**spec.overrides, "num_hidden_layers": num_layers})
    torch.manual_seed(17)
    model: Any = AutoModelForCausalLM.from_config(spec.build(), dtype=torch.float32).eval()
    scale_weights(model, spec.factor)
    end = frequent_tokens(model) if family in ENDING else VOCAB_SIZE - 1
    model.config.eos_token_id = end
    model.generation_config = GenerationConfig(eos_token_id=end, bos_token_id=1, pad_token_id=0)
    # Mistral stands for the checkpoints that come in several files.
    model.save_pretrained(folder / family, max_shard_size="100KB" if family == "mistral" else "1GB")
    return folder / family


@torch.no_grad()
def scale_weights(model: PreTrainedModel, factor: float = 6.0) -> None:
    """Multiplies matrices by ``factor`` and adds noise of 0.1 to vectors, in place."""
    generator = torch.Generator().manual_seed(29)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(factor)
        else:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.add_(torch.randn(buffer.shape, generator=generator), alpha=0.1)


@torch.no_grad()
def frequent_tokens(model: Any, count: int = 8) -> list[int]:
    """Returns the tokens that greedy decoding of eight random prompts emits most often after the first step."""
    prompts = torch.randint(3, VOCAB_SIZE, (8, 12), generator=torch.Generator().manual_seed(31))
    output = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), min_new_tokens=12, max_new_tokens=12, do_sample=False
    )
    counts = torch.bincount(output[:, 13:].flatten(), minlength=VOCAB_SIZE)
    return [int(token) for token in counts.topk(count).indices]
