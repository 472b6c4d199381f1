"""Reading a checkpoint into a model through transformers' own conversion, a layer at a time.

The library's `from_pretrained` reads ahead of its conversion without a bound: a mixture of experts needs the memory of six
layers more than the model. Here it gets the tensors of one layer, converts them, and only then those of the next.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.loading_report import LoadStateDictInfo

from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.runtime.checkpoint import StoredTensor, group_by_layer, read_tensors
from flexgen_helm.runtime.layers import FirstLayers, layers_path, num_layers_of_every_kind

FEW_TOKENS = 4096
"""Vocabulary of a model of first layers, in which there are enough tokens to compare."""


def read_model(
    name: str, folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Make the model of a folder, with the library's own classes and conversion.

    At its peak, memory holds the model and one layer; for a GPU, host memory holds what becomes one layer, twice.

    Args:
        name: For messages.
        folder: Of the model.
        config: Of the model.
        dtype: Of its weights; some modules keep float32.
        device: Where the model shall be.

    Returns:
        A model equal to that of `from_pretrained`.

    Raises:
        CorruptFile: If files are missing, torn or of another model.
        FlexGenError: If the model is larger than what is free on the GPU.
    """
    stored = read_tensors(folder)
    model = _empty_model(folder, config, dtype)
    _check_room(name, model, device)
    _Loader(name, folder, model, dtype=dtype, device=device).load(stored.values())
    model.eval()
    model.generation_config = _generation_config(folder)
    return model


def read_first_layers(name: str, folder: Path, config: PreTrainedConfig, *, device: torch.device) -> PreTrainedModel:
    """Make the model of a folder in float32, with as many of its first layers as hold one of every kind.

    Its vocabulary is cut to the first `FEW_TOKENS` where the model can be made so: embeddings and head are often larger
    than several layers.

    Raises:
        UnsupportedModel: If it has no list of layers.
        CorruptFile: If files are missing, torn or of another model.
    """
    stored = list(read_tensors(folder).values())
    few = copy.deepcopy(config)
    text = few.get_text_config(decoder=True)
    size, text.vocab_size, text.pad_token_id = text.vocab_size, min(text.vocab_size, FEW_TOKENS), None
    rows = [tensor.first_rows(text.vocab_size) if tensor.shape[:1] == (size,) else tensor for tensor in stored]
    try:
        return _first_layers(name, folder, few, rows, device)
    except Exception:  # not all that depends on the vocabulary is a row for each token
        return _first_layers(name, folder, config, stored, device)


def _first_layers(
    name: str, folder: Path, config: PreTrainedConfig, stored: list[StoredTensor], device: torch.device
) -> PreTrainedModel:
    model = _empty_model(folder, config, torch.float32)
    path = layers_path(model)
    layers = list(model.get_submodule(path).children())
    model.set_submodule(path, FirstLayers(layers[: num_layers_of_every_kind(model, layers)]))
    left = model.state_dict().keys()
    tied = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {key: source for key, source in tied if {key, source} <= left}
    _Loader(name, folder, model, dtype=torch.float32, device=device).load(stored, partly=True)
    model.eval()
    return model


class _Loader:
    """Gives a model on the meta device its weights."""

    def __init__(self, name: str, folder: Path, model: PreTrainedModel, *, dtype: torch.dtype, device: torch.device) -> None:
        self._name, self._folder, self._model, self._device = name, folder, model, device
        self._mapping = cast(Any, get_model_conversion_mapping(model))
        self._settings = LoadStateDictConfig(
            pretrained_model_name_or_path=str(folder),
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=self._mapping,
        )
        self._empty: dict[str, torch.Tensor] = model.state_dict()

    def load(self, stored: Iterable[StoredTensor], *, partly: bool = False) -> None:
        """Read all weights, and make what no file holds: tied weights, buffers that are computed.

        Args:
            stored: What the files hold.
            partly: Whether it is meant that they hold more than the model.
        """
        tensors = sorted(stored, key=lambda tensor: dot_natural_key(tensor.name))
        targets = self._targets(tensors)
        if partly:
            tensors = [tensor for tensor in tensors if targets[tensor.name] in self._empty]
        with _one_bar(sum(tensor.num_bytes for tensor in tensors)) as bar:
            info = self._load_layer([], targets)
            for layer in group_by_layer(tensors, targets.__getitem__).values():
                loaded = self._load_layer(layer, targets)
                info.missing_keys &= loaded.missing_keys
                info.unexpected_keys |= loaded.unexpected_keys
                bar.update(sum(tensor.num_bytes for tensor in layer))
        info = self._model._finalize_model_loading(self._model, self._settings, info)
        missing = sorted(info.missing_keys)
        if missing:
            raise CorruptFile(
                f"The weights of {self._name} lack {len(missing)} tensors of its config: {', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}. Fetch {self._folder} again."
            )
        self._model.to(self._device)  # type: ignore[arg-type]

    def _targets(self, tensors: list[StoredTensor]) -> dict[str, str]:
        """Return the name in the model of each tensor, once its shape is checked where no conversion changes it."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        prefix, targets = self._model.base_model_prefix, dict[str, str]()
        for tensor in tensors:
            key, pattern = rename_source_key(tensor.name, renamings, converters, prefix, self._empty)
            if key not in self._empty and tensor.name in self._empty:
                key, pattern = tensor.name, None
            expected = self._empty.get(key)
            if pattern is None and expected is not None and expected.shape != tensor.shape:
                raise CorruptFile(
                    f"{tensor.file}: {tensor.name} has the shape {list(tensor.shape)}, but by the config of {self._name} it is "
                    f"{list(expected.shape)}: a file of another model. Fetch config and weights of the same model."
                )
            targets[tensor.name] = key
        return targets

    def _load_layer(self, tensors: list[StoredTensor], targets: dict[str, str]) -> LoadStateDictInfo:
        state = {tensor.name: tensor for tensor in tensors}
        info: LoadStateDictInfo = convert_and_load_state_dict_in_model(self._model, state, self._settings)[0]
        wrong = {key: f"{list(found)} instead of {list(expected)}" for key, found, expected in info.mismatched_keys}
        wrong |= {key: " ".join(report.splitlines()[-2:]) for key, report in info.conversion_errors.items()}
        if wrong:
            sources = [tensor for tensor in tensors if targets[tensor.name] in wrong] or tensors
            raise CorruptFile(
                f"{', '.join(sorted({tensor.file.name for tensor in sources}))} in {self._folder} does not fit the config of "
                f"{self._name}: {'; '.join(f'{key} {reason}' for key, reason in wrong.items())}. Fetch config and weights of "
                "the same model."
            )
        self._move(self._empty.keys() - info.missing_keys)
        _return_freed_memory()
        return info

    def _move(self, keys: Iterable[str]) -> None:
        if self._device.type == "cpu":
            return
        for key in keys:
            path, _, name = key.rpartition(".")
            module = self._model.get_submodule(path)
            tensor = getattr(module, name)
            moved = tensor.detach().to(self._device)
            if isinstance(tensor, nn.Parameter):
                moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
            moved._is_hf_initialized = True  # Else the library makes it anew.
            setattr(module, name, moved)


def _return_freed_memory() -> None:
    """Hand back what the C library keeps of freed tensors up to 32 MiB: without this, a layer more after a few layers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _empty_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model_class.config_class == config.sub_configs.get("text_config"):
        config = config.get_text_config()
    config = copy.deepcopy(config)
    config.name_or_path = str(folder)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    with ExitStack() as stack:
        for context in model_class.get_init_context(dtype, False, False, False):
            stack.enter_context(context)
        model: PreTrainedModel = model_class(config)
    return model


def _check_room(name: str, model: PreTrainedModel, device: torch.device) -> None:
    if device.type != "cuda":
        return
    tied = model.all_tied_weights_keys
    needed = sum(tensor.nbytes for key, tensor in model.state_dict().items() if key not in tied)
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise FlexGenError(
            f"{name} needs {needed / 2**30:.1f} GiB on {device}, where {free / 2**30:.1f} GiB are free. Use device='cpu'; "
            "weights on several tiers are not supported yet."
        )


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        return GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", local_files_only=True, _from_model_config=True
        )


@contextmanager
def _one_bar(num_bytes: int) -> Iterator[tqdm[Any]]:
    """Show one bar on a terminal, and none of the library's, which would draw one for each layer."""
    shown = transformers_logging.is_progress_bar_enabled()
    bar = tqdm(total=num_bytes, desc="Loading weights", unit="B", unit_scale=True, disable=not (shown and sys.stderr.isatty()))
    transformers_logging.disable_progress_bar()
    try:
        with bar:
            yield bar
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
