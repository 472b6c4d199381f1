"""Find the decoder layers of a model, which of them share weights, and which of them are of one kind."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from flexgen_helm.errors import UnsupportedModel

KEEPS_KV_FOR_OTHERS, READS_OTHERS_KV = "store_full_length_kv", "is_kv_shared_layer"
"""Settings of Gemma 4's attention. From transformers 5.24 on, the last layer of each type keeps its K and V for other layers
even if no layer reads them. Then the first setting is ignored; otherwise the last layer would be of a kind of its own, and a
check of the first layers would need all of them."""


class FirstLayers(nn.ModuleList):
    """A layer list that holds only the first layers of a model, whose config still gives the number of all."""


def layers_path(model: PreTrainedModel) -> str:
    """Return the dotted name of the decoder's layer list within the model, such as "model.layers".

    Raises:
        UnsupportedModel: If the model has no module list of the length that its config gives.
    """
    depths = _depths(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = [name for name, module in lists.items() if isinstance(module, FirstLayers) or len(module) in depths]
    for name in sorted(found, key=lambda name: lists[name] not in inside):
        return str(name)
    raise UnsupportedModel("it has no list of decoder layers of the length that its config names")


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers in their order.

    Raises:
        UnsupportedModel: If the model has no list of decoder layers.
    """
    return list(model.get_submodule(layers_path(model)).children())


def shared_layers(model: PreTrainedModel) -> list[int]:
    """Return the indices of layers that have weights tied to tensors elsewhere, so that they cannot be placed on their own.

    Args:
        model: The model, on any device, with its list of layers in place.

    Raises:
        UnsupportedModel: If the model has no list of decoder layers.
    """
    beginning = f"{layers_path(model)}."
    tied = [key for pair in model.all_tied_weights_keys.items() for key in pair if key.startswith(beginning)]
    return sorted({int(key.removeprefix(beginning).partition(".")[0]) for key in tied})


def refuse_shared_layers(model: PreTrainedModel) -> None:
    """Refuse a model whose layers share weights, because its layers cannot be placed one by one.

    Raises:
        UnsupportedModel: If any layers share weights.
    """
    shared = shared_layers(model)
    if shared:
        raise UnsupportedModel(
            f"{model.name_or_path}: layers {', '.join(map(str, shared[:5]))} share weights with other layers, so layers cannot "
            "be placed one by one. Run it where the whole model fits on the device."
        )


def layer_kinds(model: PreTrainedModel, layers: list[nn.Module]) -> list[int]:
    """Return for each layer the index of the first layer of its kind.

    Layers are of one kind if they have equal parameter shapes, equal plain attributes (numbers, strings, classes of modules),
    and equal entries in each list of the config that has one entry per layer.

    Args:
        model: The model to which the layers belong.
        layers: All layers of the model, or those in its `FirstLayers`.
    """
    depths = _depths(model)
    config = vars(model.config.get_text_config(decoder=True)).values()
    columns = [column for column in config if isinstance(column, list | tuple) and len(column) in depths | {len(layers)}]
    settings = [_plain_settings(layer) for layer in layers]
    if not any(found[key] == str(True) for found in settings for key in found if key[1] == READS_OTHERS_KV):
        settings = [{key: value for key, value in found.items() if key[1] != KEEPS_KV_FOR_OTHERS} for found in settings]
    keys = {key for found in settings for key in found}
    indices = {key for key in keys if all(key not in found or found[key] == str(j) for j, found in enumerate(settings))}
    kinds = [
        (
            [str(column[j]) for column in columns],
            [(name, parameter.shape) for name, parameter in layer.named_parameters()],
            {key: value for key, value in settings[j].items() if key not in indices},
        )
        for j, layer in enumerate(layers)
    ]
    return [kinds.index(kind) for kind in kinds]


def num_layers_of_every_kind(model: PreTrainedModel, layers: list[nn.Module]) -> int:
    """Return the smallest number of first layers that include every kind of `layer_kinds`, but at least 2 if there are 2."""
    return max(min(2, len(layers)), max(layer_kinds(model, layers)) + 1)


def _depths(model: PreTrainedModel) -> set[int]:
    """Return the number of layers that the config gives, under each of the names in use."""
    text = model.config.get_text_config(decoder=True)
    return {
        depth for name in ("num_hidden_layers", "num_layers", "n_layer") if (depth := getattr(text, name, None)) is not None
    }


def _plain_settings(layer: nn.Module) -> dict[tuple[str, str], str]:
    """Return the classes and plain attributes of a layer's modules, by module and attribute name."""
    modules = dict(layer.named_modules())
    found = {(name, "class"): type(module).__name__ for name, module in modules.items()}
    for name, module in modules.items():
        found |= {(name, key): str(v) for key, v in vars(module).items() if isinstance(v, bool | int | float | str)}
    return found
