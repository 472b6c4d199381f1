"""Dummy weights for any configuration, for benchmarks of models of which there are no files.

Matrices are filled with one block of normal values over and over, since drawing them anew is an order of magnitude slower than
the copy. Its length is a prime, so that no two rows of a matrix are equal. Vectors (norms, biases, what a formula gives) are
what transformers would begin to train with. FlexGen's dummy weights are all ones, whose products overflow in 16 bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from flexgen_helm.errors import FlexGenError
from flexgen_helm.loading.assembly import (
    LayerKeeper,
    assemble,
    cut_to_first_layers,
    empty_model,
    initialize,
    put,
    with_few_tokens,
)
from flexgen_helm.loading.checkpoint import layer_of

BLOCK = 1_048_583
"""Values of the block: a prime, so that it is begun at another place in every row."""
SCALE = 0.02
"""Standard deviation of the values, transformers' usual one."""
NAME = "dummy weights"


class DummyWeights:
    """A source of weights for a model on the meta device. A tensor's values depend on its name, shape and dtype alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Draw the block; nothing else is made."""
        self._model = model
        self._block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * SCALE
        self._blocks: dict[torch.dtype, Tensor] = {}
        self._parts: dict[str, list[str]] = {}
        for key in model.state_dict():
            if key not in model.all_tied_weights_keys:
                self._parts.setdefault(layer_of(key), []).append(key)
        self.unexpected: set[str] = set()

    def parts(self) -> list[str]:
        """All parts of the model."""
        return list(self._parts)

    def fill(self, part: str) -> set[str]:
        """Make the tensors of a part; returns their names."""
        tensors = {key: self._model.get_parameter_or_buffer(key) for key in self._parts.get(part, [])}
        matrices = {key for key, tensor in tensors.items() if tensor.dim() > 1 and tensor.is_floating_point()}
        for key in matrices:
            put(self._model, key, self._matrix(key, tensors[key]))
        outside = part in tensors
        module = self._model.get_submodule(part.rpartition(".")[0] if outside else part)
        with _seeded(part):
            initialize(self._model, [module] if outside else list(module.modules()), tensors.keys() - matrices)
        return set(tensors)

    def lacks(self, names: list[str]) -> FlexGenError:
        """The error for tensors that are not made: there are none."""
        return FlexGenError(f"No dummy weights were made for {', '.join(names[:5])}.")

    def _matrix(self, key: str, like: Tensor) -> Tensor:
        """A matrix like one on the meta device, from a place in the block that its name tells."""
        if like.dtype not in self._blocks:
            self._blocks[like.dtype] = self._block.to(like.dtype)
        block = self._blocks[like.dtype].roll(zlib.crc32(key.encode()))
        made = torch.empty_like(like, device="cpu")
        for piece in made.view(-1).split(BLOCK):
            piece.copy_(block[: len(piece)])
        return made


def make_model(
    config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device, keeper: LayerKeeper | None = None
) -> PreTrainedModel:
    """Make a model of dummy weights; see `flexgen_helm.loading.read_model.read_model`.

    Args:
        config: Of any causal language model.
        dtype: Of its weights; some modules keep float32.
        device: Where the model shall be.
        keeper: Takes the layers of the decoder, each as soon as it is complete.

    Raises:
        UnsupportedModel: With a keeper, if layers share weights.
    """
    model = empty_model(NAME, config, dtype)
    return assemble(model, DummyWeights(model), device=device, keeper=keeper)


def make_first_layers(config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Make a model of dummy weights with as many of its first layers as hold one of every kind: those of the whole model.

    Its vocabulary is cut where the model can be made so.

    Raises:
        UnsupportedModel: If it has no list of layers.
    """
    try:
        return _first_layers(with_few_tokens(config), dtype, device)
    except Exception:  # see with_few_tokens
        return _first_layers(config, dtype, device)


def _first_layers(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    model = empty_model(NAME, config, dtype)
    cut_to_first_layers(model)
    return assemble(model, DummyWeights(model), device=device)


@contextmanager
def _seeded(part: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(part.encode()))
        yield
