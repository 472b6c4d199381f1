"""Keep embedding tables in host memory: rows are gathered on the CPU, and only these rows are copied to the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from flexgen_helm.memory.copies import to_device
from flexgen_helm.model.layers import layers_path

CPU = torch.device("cpu")
"""The device of host memory."""


def keep_on_host(model: PreTrainedModel, device: torch.device) -> None:
    """Move the embedding tables outside of the layers to the host. Their outputs are copied to ``device``.

    Args:
        model: The model, changed in place.
        device: The device that computes.

    Raises:
        UnsupportedModel: If the model has no list of decoder layers.
    """
    prefix = f"{layers_path(model)}."
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and not name.startswith(prefix):
            module.to(CPU)
            module.register_forward_pre_hook(_to_host, with_kwargs=True)
            module.register_forward_hook(lambda _module, _inputs, rows: to_device(rows, device))


def _to_host(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    moved: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(
        lambda x: x.to(CPU) if isinstance(x, Tensor) else x, (args, kwargs)
    )
    return moved
