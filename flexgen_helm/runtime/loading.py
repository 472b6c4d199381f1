"""Loading a model folder or hub name: config first, so that what is refused is refused before any weight is read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexgen_helm.errors import CorruptFile, FlexGenError, UnsupportedModel
from flexgen_helm.runtime.checkpoint import read_tensors
from flexgen_helm.runtime.context import context_of
from flexgen_helm.runtime.folder import folder_with_weights, folder_without_weights
from flexgen_helm.runtime.refusals import read_config, read_json, refuse_config, refuse_files, refuse_weights
from flexgen_helm.runtime.weights import read_first_layers, read_model

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class LoadedModel:
    """A model as the library made it, and what the engine must know about it."""

    name: str
    folder: Path
    """Where its files are on this machine."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int
    """Longest input with its new tokens, in tokens."""
    length_reason: str
    """Why the context ends there, for messages."""
    vocab_size: int
    end_token_ids: frozenset[int]


@dataclass(frozen=True)
class ModelSource:
    """A model of which the small files were read, and nothing else."""

    name: str
    folder: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    dtype: torch.dtype
    device: torch.device

    def num_bytes(self) -> int:
        """Bytes of its weights on disk."""
        return sum(tensor.num_bytes for tensor in read_tensors(self.folder).values())

    def first_layers(self) -> LoadedModel:
        """Load in float32 as many of its first layers as hold one of every kind.

        Raises:
            UnsupportedModel: If it has no list of layers.
            CorruptFile: If files are missing, torn, or of different models.
        """
        return self._loaded(read_first_layers(self.name, self.folder, self.config, device=self.device))

    def load(self) -> LoadedModel:
        """Load all of it.

        Raises:
            CorruptFile: If files are missing, torn, or of different models.
            FlexGenError: If there is no room for it.
        """
        loaded = self._loaded(read_model(self.name, self.folder, self.config, dtype=self.dtype, device=self.device))
        logger.info("%s: jobs of up to %s tokens (%s)", self.name, loaded.max_length, loaded.length_reason)
        return loaded

    def _loaded(self, model: PreTrainedModel) -> LoadedModel:
        max_length, reason = context_of(model, self.config)
        vocab_size = self.config.get_text_config(decoder=True).vocab_size
        end_ids = _end_token_ids(model)
        return LoadedModel(self.name, self.folder, model, self.tokenizer, max_length, reason, vocab_size, end_ids)


def open_model(name_or_path: str, *, dtype: str, device: torch.device, revision: str | None = None) -> ModelSource:
    """Read config and tokenizer; what they show to be unsupported is refused before any weight is read.

    Args:
        name_or_path: A folder, or a name on the model hub.
        dtype: "auto" (the checkpoint's on a GPU, float32 on a CPU), "float32", "bfloat16" or "float16".
        device: Where the matrices are multiplied.
        revision: Of a hub name.

    Raises:
        UnsupportedModel: If the model is of a kind that cannot be run.
        CorruptFile: If files are missing or torn.
        FlexGenError: If there is no such model.
    """
    name = name_or_path
    folder = folder_without_weights(name, revision)
    refuse_files(name, folder)
    config = read_config(name, folder)
    refuse_config(name, config)
    tokenizer = _read_tokenizer(name, folder)
    folder = folder_with_weights(name, revision, folder)
    refuse_weights(name, folder)
    return ModelSource(name, folder, config, tokenizer, _dtype(dtype, config, device), device)


def _dtype(name: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    if name == "auto":
        own = getattr(config, "dtype", None)
        return own if device.type != "cpu" and isinstance(own, torch.dtype) else torch.float32
    if name not in DTYPES:
        raise FlexGenError(f"dtype is {name!r}. Give 'auto' or one of {', '.join(map(repr, DTYPES))}.")
    return DTYPES[name]


def _read_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        logger.info("%s has no tokenizer: jobs must give token_ids", name)
        return None
    settings = folder / "tokenizer_config.json"
    brings_code = settings.exists() and "auto_map" in read_json(settings)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        if brings_code:
            raise UnsupportedModel(
                f"{name}: its tokenizer brings its own code (trust_remote_code), which is never run, and cannot be read "
                f"without it ({type(error).__name__}: {error}). Put a tokenizer.json into the folder, or remove "
                "tokenizer_config.json and give token_ids."
            ) from error
        raise CorruptFile(f"The tokenizer in {folder} could not be read ({type(error).__name__}: {error}).") from error
    if brings_code:
        logger.info("%s: its tokenizer's own code is not run; transformers' %s is used", name, type(tokenizer).__name__)
    return tokenizer


def _end_token_ids(model: PreTrainedModel) -> frozenset[int]:
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = own if own is not None else model.config.get_text_config(decoder=True).eos_token_id
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
