"""A model on the meta device gets its weights part by part, wherever they come from; its layers may be handed over one by one.

So a model is never whole in memory: what is kept of a layer is the keeper's business, and there is one layer more at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from flexgen_helm.errors import FlexGenError, UnsupportedModel
from flexgen_helm.memory.allocator import return_freed_memory
from flexgen_helm.model.layers import FirstLayers, layers_path, num_layers_of_every_kind, refuse_shared_layers

CPU = torch.device("cpu")
FEW_TOKENS = 4096
"""Vocabulary of a model of first layers, in which there are enough tokens to compare."""


class LayerKeeper(Protocol):
    """Takes over the layers of a model that is being loaded."""

    def has(self, j: int) -> bool:
        """Whether the weights of layer j need not be read. Asked once for each layer, in their order."""

    def keep(self, j: int, layer: nn.Module) -> None:
        """Take over the tensors of layer j: they may stay, become views of the keeper's memory or go to the meta device.

        Args:
            j: The layer, in the order of the decoder; every layer that the keeper does not have comes.
            layer: With parameters and persistent buffers complete, on the CPU, in their final dtypes. Its other buffers are
                still on the meta device; they are computed when all layers were handed over.
        """


class WeightSource(Protocol):
    """Where the values of a model's tensors come from.

    A part is a numbered module, such as ``model.layers.3``, or a single tensor outside of those, such as ``lm_head.weight``.
    """

    unexpected: set[str]
    """Names of tensors that the model does not have."""

    def parts(self) -> Iterable[str]:
        """All parts of which there are values, in the order in which they are best given."""

    def fill(self, part: str) -> set[str]:
        """Put the values of a part into the model, on the CPU; returns the names of the tensors that have one now."""

    def lacks(self, names: list[str]) -> FlexGenError:
        """The error for tensors without a value."""


def empty_model(folder: Path | str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model on the meta device, in which shapes and dtypes are known and nothing else is.

    Args:
        folder: What the model shall be called.
        config: Of the model.
        dtype: Of its weights; some modules keep float32.

    Raises:
        UnsupportedModel: If transformers cannot make it.
    """
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model_class.config_class == config.sub_configs.get("text_config"):
        config = config.get_text_config()
    config = copy.deepcopy(config)
    config.name_or_path = str(folder)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    try:
        with ExitStack() as stack:
            for context in model_class.get_init_context(dtype, False, False, False):
                stack.enter_context(context)
            model: PreTrainedModel = model_class(config)
    except Exception as error:  # of transformers, which checks few fields before it computes with them
        raise UnsupportedModel(_not_made(str(folder), config, error)) from error
    return model


def with_few_tokens(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a model of the first `FEW_TOKENS` tokens: embeddings and head are often larger than several layers.

    Not every model can be made so: what depends on the vocabulary is not always a row for each token.
    """
    few = copy.deepcopy(config)
    text = few.get_text_config(decoder=True)
    text.vocab_size, text.pad_token_id = min(text.vocab_size, FEW_TOKENS), None
    return few


def cut_to_first_layers(model: PreTrainedModel) -> None:
    """Leave a model as many of its first layers as hold one of every kind.

    Raises:
        UnsupportedModel: If it has no list of layers.
    """
    path = layers_path(model)
    layers = list(model.get_submodule(path).children())
    model.set_submodule(path, FirstLayers(layers[: num_layers_of_every_kind(model, layers)]))
    left = model.state_dict().keys()
    tied = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {key: source for key, source in tied if {key, source} <= left}


def assemble(
    model: PreTrainedModel, source: WeightSource, *, device: torch.device, keeper: LayerKeeper | None = None
) -> PreTrainedModel:
    """Give a model on the meta device its weights, and make what no source holds: tied weights, buffers that are computed.

    Args:
        model: As `empty_model` made it; filled and returned.
        source: Of its weights.
        device: Where the model shall be; what a keeper takes is its own.
        keeper: Takes the layers of the decoder, each as soon as it is complete.

    Raises:
        UnsupportedModel: With a keeper, if layers share weights.
        CorruptFile: If tensors are missing or do not fit.
    """
    layers = {} if keeper is None else _layers_apart(model)
    missing = set(model.state_dict())
    for part in source.parts():
        if part not in layers:
            filled = source.fill(part)
            missing -= filled
            _move(model, filled, device)
            return_freed_memory()
    for j, part in enumerate(layers):
        assert keeper is not None
        if not keeper.has(j):
            _complete(model, source, part, layers[part] - source.fill(part))
            keeper.keep(j, model.get_submodule(part))
            return_freed_memory()
        for tensor in model.get_submodule(part).state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True  # Else transformers makes it anew.
        missing -= layers[part]
    info = LoadStateDictInfo(missing, source.unexpected, set(), [], {}, set())
    info = model._finalize_model_loading(model, LoadStateDictConfig(pretrained_model_name_or_path=model.name_or_path), info)
    if info.missing_keys:
        raise source.lacks(sorted(info.missing_keys))
    _to_device(model, list(layers), device)
    model.eval()
    return model


def put(model: PreTrainedModel, key: str, value: Tensor, *, final: bool = True) -> None:
    """Put a value in the place of a parameter or buffer; if it is final, transformers will not make it anew."""
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    value._is_hf_initialized = final  # type: ignore[attr-defined]
    setattr(module, name, value)


def initialize(model: PreTrainedModel, modules: list[nn.Module], keys: Set[str]) -> None:
    """Give tensors the values with which transformers would begin to train, or zeros where it says nothing.

    Args:
        model: To which they belong.
        modules: That hold them, outer ones first, and whose other tensors are final.
        keys: Names in the model of tensors on the meta device.
    """
    for key in keys:
        put(model, key, torch.zeros_like(model.get_parameter_or_buffer(key), device=CPU), final=False)
    owners = [owner for owner in model.modules() if isinstance(owner, PreTrainedModel) and modules[0] in set(owner.modules())]
    with torch.no_grad(), guard_torch_init_functions():
        for module in reversed(modules):
            owners[-1]._init_weights(module)
    for key in keys:
        model.get_parameter_or_buffer(key)._is_hf_initialized = True


def _not_made(name: str, config: PreTrainedConfig, error: Exception) -> str:
    """What a user can do about a configuration of which transformers makes no model."""
    text = config.get_text_config(decoder=True)
    pad, size = (getattr(text, field, None) for field in ("pad_token_id", "vocab_size"))
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, AssertionError) and isinstance(pad, int) and isinstance(size, int) and not 0 <= pad < size:
        reason = f"pad_token_id is {pad}, but the model has the tokens 0 to {size - 1}"
    elif isinstance(error, KeyError):
        reason = f"{_named_value(config.to_dict(), error.args[0]) or repr(error.args[0])} is not known to it"
    remedy = "Install the package that is named" if isinstance(error, ImportError) else "Correct its config.json"
    return (
        f"{name} ({config.model_type}): transformers {transformers.__version__} cannot make the model from its config.json "
        f"({reason}). {remedy}, or upgrade transformers if the checkpoint is newer."
    )


def _named_value(fields: dict[str, Any], value: object) -> str | None:
    """Return the field that has a value, and the value."""
    for name, found in fields.items():
        if found == value:
            return f"{name}={value!r}"
        inner = _named_value(found, value) if isinstance(found, dict) else None
        if inner:
            return inner
    return None


def _layers_apart(model: PreTrainedModel) -> dict[str, set[str]]:
    """The names of the layers, and of the tensors of each."""
    refuse_shared_layers(model)
    path = layers_path(model)
    layers = model.get_submodule(path).named_children()
    return {f"{path}.{j}": {f"{path}.{j}.{name}" for name in layer.state_dict()} for j, layer in layers}


def _complete(model: PreTrainedModel, source: WeightSource, part: str, lacking: set[str]) -> None:
    """Make the tensors of a layer that a source may leave out."""
    info = LoadStateDictInfo(set(lacking), set(), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    if info.missing_keys:
        raise source.lacks(sorted(info.missing_keys))
    if lacking:
        initialize(model, list(model.get_submodule(part).modules()), lacking)


def _move(model: PreTrainedModel, keys: Iterable[str], device: torch.device) -> None:
    if device.type != "cpu":
        for key in keys:
            put(model, key, model.get_parameter_or_buffer(key).detach().to(device))


def _to_device(model: PreTrainedModel, layers: list[str], device: torch.device) -> None:
    """Move what is not kept: everything outside of the layers, and buffers of layers that no checkpoint holds."""
    if not layers:
        model.to(device)  # type: ignore[arg-type]
        return
    path = layers_path(model)
    stack = model.get_submodule(path)
    model.set_submodule(path, nn.ModuleList())
    model.to(device)  # type: ignore[arg-type]
    model.set_submodule(path, stack)
    for key, buffer in model.named_non_persistent_buffers():
        put(model, key, buffer.to(device))
