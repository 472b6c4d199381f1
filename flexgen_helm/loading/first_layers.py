"""Make the first layers of a model on the meta device, with a small vocabulary where the model allows one.

A large model is checked on its first layers before the others are read. Embeddings and head are often larger than several
layers, so the small model gets only the rows of the first tokens.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.loading import assembly


class FewTokens(NamedTuple):
    """A model without weights, whose vocabulary is cut to its first tokens."""

    model: PreTrainedModel
    tables: dict[str, torch.Size]
    """Shape before the cut, ``[vocab, ...]``, of each tensor that has one row for each token, by its name in the model."""


class EmptyFirstLayers(NamedTuple):
    """The first layers of a model on the meta device: as many as include every kind of layer."""

    whole: PreTrainedModel
    """The first layers with the whole vocabulary."""
    few: FewTokens | None
    """The first layers with the first `assembly.FEW_TOKENS` tokens.

    It is None if the vocabulary is not larger, or if the cut changes anything but the number of rows of all tensors that have
    one row for each token.
    """


def empty_first_layers(folder: Path | str, config: PreTrainedConfig, dtype: torch.dtype) -> EmptyFirstLayers:
    """Make the first layers of a model without weights.

    Args:
        folder: The folder or name that the model gives as its ``name_or_path``.
        config: The config of the whole model.
        dtype: The dtype of the weights. transformers keeps some modules in float32.

    Raises:
        UnsupportedModel: If transformers cannot make the model, or it has no list of layers.
    """
    whole = _cut(folder, config, dtype)
    return EmptyFirstLayers(whole, _with_few_tokens(whole, folder, config, dtype))


def _with_few_tokens(
    whole: PreTrainedModel, folder: Path | str, config: PreTrainedConfig, dtype: torch.dtype
) -> FewTokens | None:
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    size, few = text.vocab_size, assembly.FEW_TOKENS
    if size <= few:
        return None
    try:
        text.vocab_size, text.pad_token_id = few, None
        model = _cut(folder, config, dtype)
    except (StrictDataclassError, UnsupportedModel):  # the type needs a padding token, or a token that was cut
        return None
    shapes, found = ({key: tensor.shape for key, tensor in each.state_dict().items()} for each in (whole, model))
    tables = {key: shape for key, shape in shapes.items() if shape[:1] == (size,)}
    expected = shapes | {key: torch.Size((few, *shape[1:])) for key, shape in tables.items()}
    return FewTokens(model, tables) if found == expected else None


def _cut(folder: Path | str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    model = assembly.empty_model(folder, config, dtype)
    assembly.cut_to_first_layers(model)
    return model
