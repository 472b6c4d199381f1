"""Loading a model folder or hub name: config first, so that what is refused is refused before any weight is read."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexgen_helm.errors import FlexGenError
from flexgen_helm.loading.assembly import CPU, LayerKeeper, empty_model
from flexgen_helm.loading.digest import model_digest
from flexgen_helm.loading.dummy_weights import make_first_layers, make_model
from flexgen_helm.loading.generation_config import read_generation_config, warn_of_unapplied_fields
from flexgen_helm.loading.hub_folder import folder_with_weights, folder_without_weights
from flexgen_helm.loading.named_configs import CONFIGS, named_config
from flexgen_helm.loading.read_model import read_first_layers, read_model
from flexgen_helm.loading.refusals import read_config, refuse_config, refuse_files, refuse_weights
from flexgen_helm.loading.tokenizer_files import read_tokenizer
from flexgen_helm.model.context_length import context_of

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model as transformers made it, and what the engine must know about it."""

    name: str
    digest: str
    """Of weights, config and tokenizer."""
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
    folder: Path | None
    """Where its files are on this machine; None: its weights are made up."""
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    dtype: torch.dtype
    device: torch.device

    def digest(self) -> str:
        """Return what tells its weights, config and tokenizer from others."""
        if self.folder is not None:
            return model_digest(self.folder)
        return f"dummy-{hashlib.sha256(self.config.to_json_string().encode()).hexdigest()[:16]}"

    def empty(self) -> PreTrainedModel:
        """Make the model without weights, on the meta device."""
        return empty_model(self.folder or "", self.config, self.dtype)

    def first_layers(self) -> LoadedModel:
        """Load as many of its first layers as hold one of every kind.

        Raises:
            UnsupportedModel: If it has no list of layers.
            CorruptFile: If files are missing, torn, or of different models.
        """
        if self.folder is None:
            return self._loaded(make_first_layers(self.config, dtype=self.dtype, device=self.device))
        return self._loaded(read_first_layers(self.name, self.folder, self.config, dtype=self.dtype, device=self.device))

    def load(self, keeper: LayerKeeper | None = None) -> LoadedModel:
        """Load all of it.

        Args:
            keeper: Takes its layers one by one; None: they stay on the device.

        Raises:
            CorruptFile: If files are missing, torn, or of different models.
            FlexGenError: If there is no room for it.
        """
        if self.folder is None:
            model = make_model(self.config, dtype=self.dtype, device=self.device, keeper=keeper)
        else:
            model = read_model(self.name, self.folder, self.config, dtype=self.dtype, device=self.device, keeper=keeper)
        loaded = self._loaded(model)
        warn_of_unapplied_fields(self.name, model)
        logger.info("%s: jobs of up to %s tokens (%s)", self.name, loaded.max_length, loaded.length_reason)
        return loaded

    def _loaded(self, model: PreTrainedModel) -> LoadedModel:
        max_length, reason = context_of(model, self.config)
        vocab_size = self.config.get_text_config(decoder=True).vocab_size
        end_ids = _end_token_ids(model, self.tokenizer)
        return LoadedModel(self.name, self.digest(), model, self.tokenizer, max_length, reason, vocab_size, end_ids)


def open_dummy(name_or_path: str, *, dtype: str, device: torch.device) -> ModelSource:
    """Read or look up a config; its weights will be made up, and jobs must give token ids.

    Args:
        name_or_path: A folder with a config.json, or one of `flexgen_helm.loading.named_configs.CONFIGS`.
        dtype: As in `open_model`.
        device: Where the matrices are multiplied.

    Raises:
        UnsupportedModel: If the model is of a kind that cannot be run.
        FlexGenError: If there is no such config.
    """
    folder = Path(name_or_path)
    config = named_config(name_or_path)
    if config is None and not (folder / "config.json").is_file():
        raise FlexGenError(
            f"There is no config {name_or_path!r} for dummy weights. Give a folder with a config.json, or one of "
            f"{', '.join(CONFIGS)}."
        )
    config = config if config is not None else read_config(name_or_path, folder)
    refuse_config(name_or_path, config)
    return ModelSource(name_or_path, None, config, None, _dtype(dtype, config, device), device)


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
    source = open_without_weights(name_or_path, dtype=dtype, device=device, revision=revision)
    assert source.folder is not None
    source.empty()  # What transformers cannot make is refused before its weights are fetched.
    folder = folder_with_weights(source.name, revision, source.folder)
    refuse_weights(source.name, folder)
    return replace(source, folder=folder)


def open_without_weights(
    name_or_path: str, *, dtype: str = "float32", device: torch.device = CPU, revision: str | None = None
) -> ModelSource:
    """Read config and tokenizer of a model whose weights are not asked for. Arguments and errors are those of `open_model`."""
    name = name_or_path
    folder = folder_without_weights(name, revision)
    refuse_files(name, folder)
    config = read_config(name, folder)
    refuse_config(name, config)
    read_generation_config(name, folder)
    return ModelSource(name, folder, config, read_tokenizer(name, folder), _dtype(dtype, config, device), device)


def named_dtype(option: str, name: str) -> torch.dtype:
    """Return the number format that a user named.

    Raises:
        FlexGenError: If there is no such format.
    """
    if name not in DTYPES:
        raise FlexGenError(f"{option} is {name!r}. Give one of {', '.join(map(repr, DTYPES))}, or leave it out.")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a number format, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def _dtype(name: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    if name == "auto":
        own = getattr(config, "dtype", None)
        return own if device.type != "cpu" and isinstance(own, torch.dtype) else torch.float32
    return named_dtype("dtype", name)


def _end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Return every token that ends a text: generation config, tokenizer and config each name those that the others lack."""
    ends = _token_ids(getattr(model.generation_config, "eos_token_id", None))
    ends |= _token_ids(getattr(tokenizer, "eos_token_id", None))
    configured = {
        token_id
        for config in (model.config, model.config.get_text_config(decoder=True))
        for token_id in _token_ids(getattr(config, "eos_token_id", None))
    }
    if ends and tokenizer is not None:
        # A config that names none has the number of its class, which may be an ordinary word of this vocabulary.
        configured &= {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return frozenset(ends | configured)


def _token_ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
