"""Open a model folder or hub name: read its config and tokenizer first, and load its weights only if the model is supported."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexgen_helm.errors import FlexGenError
from flexgen_helm.loading.assembly import CPU, LayerKeeper, empty_model
from flexgen_helm.loading.digest import model_digest
from flexgen_helm.loading.dummy_weights import make_first_layers, make_layers, make_model
from flexgen_helm.loading.generation_config import read_generation_config, warn_of_unapplied_fields
from flexgen_helm.loading.hub_folder import folder_with_weights, folder_without_weights
from flexgen_helm.loading.named_configs import CONFIGS, named_config
from flexgen_helm.loading.read_model import read_first_layers, read_layers, read_model
from flexgen_helm.loading.refusals import read_config, refuse_config, refuse_files, refuse_weights
from flexgen_helm.loading.tokenizer_files import read_tokenizer
from flexgen_helm.model.context_length import context_of

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes that a user may name."""


@dataclass(frozen=True)
class LoadedModel:
    """A model as transformers made it, and the facts about it that the engine needs."""

    name: str
    """The name or folder that the user gave."""
    digest: str
    """Digest of weights, config and tokenizer; see `ModelSource.digest`."""
    model: PreTrainedModel
    """The model with its weights."""
    tokenizer: PreTrainedTokenizerBase | None
    """The tokenizer. None means that jobs must give token ids."""
    max_length: int
    """Largest number of tokens of a job, input and new tokens together."""
    length_reason: str
    """The reason for ``max_length``, for messages."""
    vocab_size: int
    """Number of token ids that the config gives."""
    end_token_ids: frozenset[int]
    """Tokens that end a text."""


@dataclass(frozen=True)
class ModelSource:
    """A model whose config and tokenizer were read, but not its weights."""

    name: str
    """The name or folder that the user gave."""
    folder: Path | None
    """The folder of its files on this machine. None means that it gets dummy weights."""
    config: PreTrainedConfig
    """The config of the whole model."""
    tokenizer: PreTrainedTokenizerBase | None
    """The tokenizer. None means that jobs must give token ids."""
    dtype: torch.dtype
    """The dtype of the weights. transformers keeps some modules in float32."""
    device: torch.device
    """The device that computes."""

    @property
    def released_dtype(self) -> str:
        """The dtype that the config names for the weights; empty if it names none."""
        dtype = getattr(self.config, "dtype", None)
        return dtype_name(dtype) if isinstance(dtype, torch.dtype) else ""

    def digest(self) -> str:
        """Return a digest of weights, config and tokenizer, or of the config alone if the model gets dummy weights."""
        if self.folder is not None:
            return model_digest(self.folder)
        return f"dummy-{hashlib.sha256(self.config.to_json_string().encode()).hexdigest()[:16]}"

    @cached_property
    def empty(self) -> PreTrainedModel:
        """The model on the meta device, without weights; made once, and filled by nobody.

        Raises:
            UnsupportedModel: If transformers cannot make a model from the config.
        """
        return empty_model(self.folder or "", self.config, self.dtype)

    def first_layers(self) -> LoadedModel:
        """Load the first layers of the model, as many as include every kind of layer.

        Raises:
            UnsupportedModel: If transformers cannot make the model, or it has no list of layers.
            CorruptFile: If files are missing, torn, or of different models.
        """
        if self.folder is None:
            return self.described(make_first_layers(self.config, dtype=self.dtype, device=self.device))
        return self.described(read_first_layers(self.name, self.folder, self.config, dtype=self.dtype, device=self.device))

    def load(self, keeper: LayerKeeper | None = None) -> LoadedModel:
        """Load the whole model.

        Args:
            keeper: Stores the decoder's layers, each as soon as it is complete. None leaves them on the device.

        Raises:
            CorruptFile: If files are missing, torn, or of different models.
            FlexGenError: If the keeper has no room for a layer.
        """
        model = self.read(keeper)
        loaded = self.described(model)
        warn_of_unapplied_fields(self.name, model)
        logger.info("%s: jobs of up to %s tokens (%s)", self.name, loaded.max_length, loaded.length_reason)
        return loaded

    def read(self, keeper: LayerKeeper | None = None) -> PreTrainedModel:
        """Read the model itself; arguments and errors are those of `load`."""
        if self.folder is None:
            return make_model(self.config, dtype=self.dtype, device=self.device, keeper=keeper)
        return read_model(self.name, self.folder, self.config, dtype=self.dtype, device=self.device, keeper=keeper)

    def read_layers(self, keeper: LayerKeeper) -> None:
        """Read the decoder's layers and nothing else, each for a keeper; errors are those of `load`."""
        if self.folder is None:
            make_layers(self.config, dtype=self.dtype, keeper=keeper)
        else:
            read_layers(self.name, self.folder, self.config, dtype=self.dtype, keeper=keeper)

    def described(self, model: PreTrainedModel) -> LoadedModel:
        """Return a model, with its layers or without, and the facts about it."""
        max_length, reason = context_of(model, self.config)
        vocab_size = self.config.get_text_config(decoder=True).vocab_size
        end_ids = _end_token_ids(model, self.tokenizer)
        return LoadedModel(self.name, self.digest(), model, self.tokenizer, max_length, reason, vocab_size, end_ids)


def open_dummy(name_or_path: str, *, dtype: str, device: torch.device) -> ModelSource:
    """Open a model that gets dummy weights: read or look up its config. Jobs of such a model must give token ids.

    Args:
        name_or_path: A folder with a config.json, or a name in `flexgen_helm.loading.named_configs.CONFIGS`.
        dtype: "auto" (the config's on a GPU, float32 on a CPU), "float32", "bfloat16" or "float16".
        device: The device that computes.

    Raises:
        UnsupportedModel: If models of this kind cannot be run.
        CorruptFile: If the config is torn.
        FlexGenError: If there is no such config or dtype.
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
    """Open a model: read its config and tokenizer, and refuse it if it is unsupported; then download missing weights.

    Args:
        name_or_path: A folder, or a name on the model hub.
        dtype: "auto" (the config's on a GPU, float32 on a CPU), "float32", "bfloat16" or "float16".
        device: The device that computes.
        revision: Branch, tag or commit of a hub model. None means its main branch.

    Raises:
        UnsupportedModel: If models of this kind cannot be run.
        CorruptFile: If files are missing or torn.
        FlexGenError: If there is no such model or dtype.
    """
    source = open_without_weights(name_or_path, dtype=dtype, device=device, revision=revision)
    assert source.folder is not None
    _ = source.empty  # A model that transformers cannot make is refused before its weights are downloaded.
    folder = folder_with_weights(source.name, revision, source.folder)
    refuse_weights(source.name, folder)
    return source if folder == source.folder else replace(source, folder=folder)


def open_without_weights(
    name_or_path: str, *, dtype: str = "float32", device: torch.device = CPU, revision: str | None = None
) -> ModelSource:
    """Open a model as `open_model` does, with its arguments and errors, but download no weights."""
    name = name_or_path
    folder = folder_without_weights(name, revision)
    refuse_files(name, folder)
    config = read_config(name, folder)
    refuse_config(name, config)
    read_generation_config(name, folder)
    return ModelSource(name, folder, config, read_tokenizer(name, folder), _dtype(dtype, config, device), device)


def named_dtype(option: str, name: str) -> torch.dtype:
    """Return the dtype that a user named.

    Args:
        option: The option by which it was named, for the message.
        name: A key of `DTYPES`.

    Raises:
        FlexGenError: If there is no such dtype.
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
    """Return every token that ends a text. Generation config, tokenizer and config may each name some that the others lack."""
    ends = _token_ids(getattr(model.generation_config, "eos_token_id", None))
    ends |= _token_ids(getattr(tokenizer, "eos_token_id", None))
    configured = {
        token_id
        for config in (model.config, model.config.get_text_config(decoder=True))
        for token_id in _token_ids(getattr(config, "eos_token_id", None))
    }
    if ends and tokenizer is not None:
        # If the config file names none, its class has a default id, which may be an ordinary word of this vocabulary.
        configured &= {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return frozenset(ends | configured)


def _token_ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
