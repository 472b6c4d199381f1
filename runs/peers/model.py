"""OPT models of any size with random weights, which all contenders serve."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from transformers import OPTConfig, PreTrainedConfig

from flexgen_helm.cache_folder import build_once, cache_folder
from flexgen_helm.errors import FlexGenError
from flexgen_helm.loading.named_configs import named_config
from flexgen_helm.runs.memory_limit.model import write_random_weights

WIDTH, HEAD_DIM, VOCAB_SIZE = 1024, 64, 8192


def sized_config(num_bytes: int, dtype: str, *, width: int = WIDTH) -> OPTConfig:
    """Return the config with the fewest layers that reach a size, without an end token."""
    layer = 12 * width**2
    parameters = num_bytes / getattr(torch, dtype).itemsize - (VOCAB_SIZE + OPTConfig().max_position_embeddings) * width
    return OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=max(1, math.ceil(parameters / layer)),
        num_attention_heads=width // HEAD_DIM,
        bos_token_id=None,
        eos_token_id=None,
        dtype=dtype,
        architectures=["OPTForCausalLM"],
    )


def opt_folder(size: int | str, dtype: str) -> Path:
    """Return the folder of a random model, made in the cache folder at the first call.

    Args:
        size: Least bytes of the weights, or the name of an OPT such as ``facebook/opt-30b``.
        dtype: Of the weights.

    Raises:
        FlexGenError: There is no such OPT.
        OutOfSpace: The disk is too full.
    """
    if isinstance(size, int):
        config: PreTrainedConfig = sized_config(size, dtype)
        name, needed = f"opt-{size / 2**30:.3g}GiB-{dtype}-{WIDTH}", size * 5 // 4
    else:
        config, name = _named(size, dtype), f"{size.replace('/', '-')}-{dtype}"
        needed = 13 * config.num_hidden_layers * config.hidden_size**2 * getattr(torch, dtype).itemsize
    return build_once(cache_folder() / "random_models" / name, partial(write_random_weights, config), needed_bytes=needed)


def _named(name: str, dtype: str) -> PreTrainedConfig:
    config = named_config(name)
    if config is None or config.model_type != "opt":
        raise FlexGenError(f"`{name}` is no OPT that is known here. Give facebook/opt-30b, or the folder of a model.")
    config.update({"dtype": dtype, "bos_token_id": None, "eos_token_id": None, "architectures": ["OPTForCausalLM"]})
    return config
