"""Loading the weights of a model folder: the whole model, its first layers, or layer by layer to a keeper."""

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

from flexgen_helm.loading.assembly import LayerKeeper, assemble, cut_to_first_layers, empty_model, with_few_tokens
from flexgen_helm.loading.checkpoint import StoredTensor, read_tensors
from flexgen_helm.loading.conversion import Checkpoint
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
    """Make the model of a folder, with transformers' own classes and conversion.

    At its peak, memory holds the model and one layer; for a GPU, host memory holds what becomes one layer, twice. With a keeper
    it holds what is outside of the layers, what the keeper keeps, and one layer, twice.

    Args:
        name: For messages.
        folder: Of the model.
        config: Of the model.
        dtype: Of its weights; some modules keep float32.
        device: Where the model shall be.
        keeper: Takes the layers of the decoder, each as soon as it is complete; what it has already is not read.

    Returns:
        A model equal to that of `from_pretrained`, but for what a keeper did with its layers.

    Raises:
        CorruptFile: If files are missing, torn or of another model.
        UnsupportedModel: With a keeper, if layers share weights.
    """
    stored = read_tensors(folder).values()
    model = empty_model(folder, config, dtype)
    with _one_bar(Checkpoint(name, folder, model, stored, dtype=dtype)) as source:
        assemble(model, source, device=device, keeper=keeper)
    model.generation_config = read_generation_config(name, folder)
    return model


def read_first_layers(
    name: str, folder: Path, config: PreTrainedConfig, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Make the model of a folder with as many of its first layers as hold one of every kind.

    Its vocabulary is cut where the model can be made so; see `flexgen_helm.loading.assembly.with_few_tokens`.

    Raises:
        UnsupportedModel: If it has no list of layers.
        CorruptFile: If files are missing, torn or of another model.
    """
    stored = list(read_tensors(folder).values())
    few = with_few_tokens(config)
    size, fewer = (each.get_text_config(decoder=True).vocab_size for each in (config, few))
    rows = [tensor.first_rows(fewer) if tensor.shape[:1] == (size,) else tensor for tensor in stored]
    try:
        return _first_layers(name, folder, few, rows, dtype, device)
    except Exception:  # see with_few_tokens
        return _first_layers(name, folder, config, stored, dtype, device)


def _first_layers(
    name: str,
    folder: Path,
    config: PreTrainedConfig,
    stored: list[StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    model = empty_model(folder, config, dtype)
    cut_to_first_layers(model)
    with _one_bar(Checkpoint(name, folder, model, stored, dtype=dtype, partly=True)) as source:
        return assemble(model, source, device=device)


@contextmanager
def _one_bar(source: Checkpoint) -> Iterator[Checkpoint]:
    """Show one bar on a terminal, and none of transformers', which would draw one for each layer."""
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
