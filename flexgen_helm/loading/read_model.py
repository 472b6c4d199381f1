"""Read the model of a checkpoint folder: the whole model, its first layers, or layer by layer for a keeper."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from flexgen_helm.loading.assembly import LayerKeeper, assemble, empty_model, fill_layers
from flexgen_helm.loading.checkpoint import read_tensors
from flexgen_helm.loading.conversion import Checkpoint, first_rows
from flexgen_helm.loading.first_layers import empty_first_layers
from flexgen_helm.loading.generation_config import read_generation_config


def read_model(
    name: str,
    folder: Path,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    keeper: LayerKeeper | None = None,
) -> PreTrainedModel:
    """Read the model of a folder, with transformers' own classes and conversion of weights.

    At its peak, memory holds the model and one more layer. If the device is a GPU, host memory holds the tensors of one layer,
    twice. With a keeper, memory holds the tensors outside of the layers, what the keeper stores, and one layer, twice.

    Args:
        name: The model's name, for messages.
        folder: The folder with config and weights.
        config: The config of the model.
        dtype: The dtype of the weights. transformers keeps some modules in float32.
        device: The device for the model.
        keeper: Stores the decoder's layers, each as soon as it is complete; layers that it has already are not read. See
            `flexgen_helm.loading.assembly.assemble`.

    Returns:
        A model equal to that of `from_pretrained`, except for the layers that the keeper stores.

    Raises:
        CorruptFile: If files are missing, torn or of another model.
        UnsupportedModel: If transformers cannot make the model, or a tensor has a dtype that torch cannot read.
    """
    stored = read_tensors(folder).values()
    model = empty_model(folder, config, dtype)
    with _one_bar(Checkpoint(name, folder, model, stored, dtype=dtype)) as source:
        assemble(model, source, device=device, keeper=keeper)
    model.generation_config = read_generation_config(name, folder)
    return model


def read_layers(name: str, folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype, keeper: LayerKeeper) -> None:
    """Read the decoder's layers of a folder, each for a keeper, and nothing else; see `read_model` for arguments and errors."""
    model = empty_model(folder, config, dtype)
    with _one_bar(Checkpoint(name, folder, model, read_tensors(folder).values(), dtype=dtype)) as source:
        fill_layers(model, source, keeper)


def read_first_layers(
    name: str, folder: Path, config: PreTrainedConfig, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Read the first layers of a model, as many as include every kind of layer.

    The vocabulary is cut if the model and its files allow it; see `flexgen_helm.loading.first_layers`.

    Args:
        name: The model's name, for messages.
        folder: The folder with config and weights.
        config: The config of the whole model.
        device: The device for the model.
        dtype: The dtype of the weights. transformers keeps some modules in float32.

    Raises:
        UnsupportedModel: If transformers cannot make the model, or it has no list of layers.
        CorruptFile: If files are missing, torn or of another model.
    """
    stored = list(read_tensors(folder).values())
    model, few = empty_first_layers(folder, config, dtype)
    rows = None if few is None else first_rows(stored, few)
    if few is not None and rows is not None:
        model, stored = few.model, rows
    with _one_bar(Checkpoint(name, folder, model, stored, dtype=dtype, partly=True)) as source:
        return assemble(model, source, device=device)


@contextmanager
def _one_bar(source: Checkpoint) -> Iterator[Checkpoint]:
    """Show one progress bar on a terminal for all reading, in place of transformers', which would draw one for each layer."""
    shown = transformers_logging.is_progress_bar_enabled()
    bar: tqdm[Any] = tqdm(
        total=source.num_bytes,
        desc="Loading weights",
        unit="B",
        unit_scale=True,
        disable=not (shown and sys.stderr.isatty()),
    )
    source.on_read = bar.update
    transformers_logging.disable_progress_bar()
    try:
        with bar:
            yield source
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
