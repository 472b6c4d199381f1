"""Fill a transformers model on the meta device with weights, one layer at a time.

The weights come from a `WeightSource`. Each layer, once it is complete, may be passed to a `LayerKeeper`, which decides where
it is stored. So the model is never whole in memory: memory holds what the keeper leaves there, and one more layer.
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
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from flexgen_helm.errors import FlexGenError, UnsupportedModel
from flexgen_helm.memory.allocator import return_freed_memory
from flexgen_helm.model.layers import FirstLayers, layers_path, num_layers_of_every_kind, shared_layers

CPU = torch.device("cpu")
"""The device on which weights are read and converted."""
FEW_TOKENS = 4096
"""Vocabulary, in tokens, of a model of first layers; enough to compare its answers with those of transformers."""


class LayerKeeper(Protocol):
    """Stores the layers of a model while it is loaded."""

    def has(self, j: int) -> bool:
        """Return whether the weights of layer j are stored already and need not be read. Called once a layer, in order."""

    def keep(self, j: int, layer: nn.Module) -> None:
        """Store the tensors of layer j. They may stay, become views of the keeper's memory, or move to the meta device.

        Called once, in the order of the decoder, for each layer for which `has` returned False.

        Args:
            j: Index of the layer.
            layer: The layer. Its parameters and persistent buffers are complete, on the CPU, in their final dtypes. Its other
                buffers are still on the meta device; they are computed after the last layer.
        """


class WeightSource(Protocol):
    """Puts values into the tensors of a model, part by part.

    A part is a numbered module, such as ``model.layers.3``, or a single tensor outside of numbered modules, such as
    ``lm_head.weight``.
    """

    unexpected: set[str]
    """Names of the source's tensors that the model does not have, of the parts filled so far."""

    def parts(self) -> Iterable[str]:
        """Return all parts for which the source has values, in the order in which they are best filled."""

    def fill(self, part: str) -> set[str]:
        """Put the values of a part into the model, on the CPU, and return the model's names of the tensors that it filled."""

    def lacks(self, names: list[str]) -> FlexGenError:
        """Return the error to raise for tensors of the model, by name, that the source has no values for."""


def empty_model(folder: Path | str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model on the meta device: its tensors have shapes and dtypes, but no values.

    Args:
        folder: The folder or name that the model gives as its ``name_or_path``.
        config: The config of the model. It is not modified.
        dtype: The dtype of the weights. transformers keeps some modules in float32.

    Raises:
        UnsupportedModel: If transformers cannot make a model from the config.
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
    except Exception as error:  # transformers computes with most fields without checking them
        raise UnsupportedModel(_not_made(str(folder), config, error)) from error
    _keep_in_float32(model, dtype)
    return model


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give tensors the dtypes in which transformers loads them: storage is made for these, and would round others."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    pattern, names, _ = build_glob_alternation(list(plan))
    for key, tensor in model.state_dict(keep_vars=True).items() if plan else ():
        found = pattern.search(key)
        if found is not None and found.lastgroup is not None:
            tensor.data = tensor.data.to(plan[names[found.lastgroup]])


def cut_to_first_layers(model: PreTrainedModel) -> None:
    """Remove all layers of a model but its first ones, keeping as many as include every kind of layer.

    Raises:
        UnsupportedModel: If the model has no list of layers.
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
    """Fill a model on the meta device with its weights, tie weights, and compute the buffers that no checkpoint holds.

    Args:
        model: A model made by `empty_model`. It is filled and returned.
        source: The source of its weights.
        device: The device for the model. Layers are placed by the keeper, if there is one.
        keeper: Stores the decoder's layers, each as soon as it is complete. None leaves them on ``device``. Layers that share
            weights cannot be kept one by one; the caller must have refused them (`refuse_shared_layers`).

    Raises:
        CorruptFile: If tensors are missing or do not fit the model.
    """
    layers = {} if keeper is None else _tensors_by_layer(model)
    missing = set(model.state_dict())
    for part in source.parts():
        if part not in layers:
            filled = source.fill(part)
            missing -= filled
            _move(model, filled, device)
            return_freed_memory()
    if keeper is not None:
        fill_layers(model, source, keeper)
    for part in layers:
        for tensor in model.get_submodule(part).state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True  # Otherwise transformers would initialize it again.
        missing -= layers[part]
    info = LoadStateDictInfo(missing, source.unexpected, set(), [], {}, set())
    info = model._finalize_model_loading(model, LoadStateDictConfig(pretrained_model_name_or_path=model.name_or_path), info)
    if info.missing_keys:
        raise source.lacks(sorted(info.missing_keys))
    _to_device(model, list(layers), device)
    model.eval()
    return model


def fill_layers(model: PreTrainedModel, source: WeightSource, keeper: LayerKeeper) -> None:
    """Fill the decoder's layers of a model on the meta device one after the other, and nothing else.

    Args:
        model: A model made by `empty_model`.
        source: The source of its weights.
        keeper: Stores each layer as soon as it is complete.

    Raises:
        CorruptFile: If tensors are missing or do not fit the model.
    """
    for j, (part, tensors) in enumerate(_tensors_by_layer(model).items()):
        if not keeper.has(j):
            _complete(model, source, part, tensors - source.fill(part))
            keeper.keep(j, model.get_submodule(part))
            return_freed_memory()


def put(model: PreTrainedModel, key: str, value: Tensor, *, final: bool = True) -> None:
    """Replace a parameter or buffer by a value.

    Args:
        model: The model, changed in place.
        key: Dotted name of the tensor in the model.
        value: The new value, of any device and dtype.
        final: Whether transformers must not initialize the tensor again.
    """
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    value._is_hf_initialized = final  # type: ignore[attr-defined]
    setattr(module, name, value)


def initialize(model: PreTrainedModel, modules: list[nn.Module], keys: Set[str]) -> None:
    """Give tensors the values with which transformers would begin training, or zeros where it defines none.

    Args:
        model: The model that holds the tensors.
        modules: The modules that hold the tensors, outer ones first. All their other tensors must be final.
        keys: Names in the model of the tensors to fill, which are on the meta device.
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
    """Return the message for a config from which transformers makes no model: the reason, and a remedy."""
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
    """Return the first field of a config, nested ones included, that has this value, as "field=value"."""
    for name, found in fields.items():
        if found == value:
            return f"{name}={value!r}"
        inner = _named_value(found, value) if isinstance(found, dict) else None
        if inner:
            return inner
    return None


def _tensors_by_layer(model: PreTrainedModel) -> dict[str, set[str]]:
    """Return the names of each layer's tensors, by the name of the layer."""
    assert not shared_layers(model)  # The plan of memory refuses these before anything is read.
    path = layers_path(model)
    layers = model.get_submodule(path).named_children()
    return {f"{path}.{j}": {f"{path}.{j}.{name}" for name in layer.state_dict()} for j, layer in layers}


def _complete(model: PreTrainedModel, source: WeightSource, part: str, lacking: set[str]) -> None:
    """Initialize the tensors of a layer that checkpoints may lack; any other lacking tensor is an error."""
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
    """Move to the device what no keeper stores: all tensors outside of the layers, and the layers' computed buffers."""
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
