"""Make random weights for any config, for benchmarks of models whose checkpoints are not available.

Every matrix is filled with copies of one block of normal values, because copying is an order of magnitude faster than drawing
new ones. The length of the block is a prime, so that no two rows of a matrix are equal. Vectors (norms, biases, values given by
a formula) get the values with which transformers would begin training. FlexGen's dummy weights are all ones, whose products
overflow in 16 bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from flexgen_helm.errors import FlexGenError
from flexgen_helm.loading.assembly import LayerKeeper, assemble, empty_model, fill_layers, initialize, put
from flexgen_helm.loading.checkpoint import layer_of
from flexgen_helm.loading.first_layers import empty_first_layers

BLOCK = 1_048_583
"""Number of values in the block: a prime, so that each row of a matrix starts at another place in the block."""
SCALE = 0.02
"""Standard deviation of the values, the one that most transformers models are initialized with."""
NAME = "dummy weights"
"""Name of every model of dummy weights, for messages."""


class DummyWeights:
    """A `WeightSource` of random values. The values of a tensor depend on its name, shape and dtype alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Draw the block of values; no tensor of the model is made yet.

        Args:
            model: The model to fill, on the meta device.
        """
        self._model = model
        self._block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * SCALE
        self._blocks: dict[torch.dtype, Tensor] = {}
        self._parts: dict[str, list[str]] = {}
        for key in model.state_dict():
            if key not in model.all_tied_weights_keys:
                self._parts.setdefault(layer_of(key), []).append(key)
        self.unexpected: set[str] = set()

    def parts(self) -> list[str]:
        """Return all parts of the model."""
        return list(self._parts)

    def fill(self, part: str) -> set[str]:
        """Make the tensors of a part on the CPU, and return their names."""
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
        """Return the error for tensors that were not made; it is raised only if this class has a fault."""
        return FlexGenError(f"No dummy weights were made for {', '.join(names[:5])}.")

    def _matrix(self, key: str, like: Tensor) -> Tensor:
        """Make a matrix of the shape and dtype of ``like``, from the place in the block that its name determines."""
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
    """Make a model of dummy weights.

    Args:
        config: The config of any causal language model.
        dtype: The dtype of the weights. transformers keeps some modules in float32.
        device: The device for the model.
        keeper: Stores the decoder's layers, each as soon as it is complete; see `flexgen_helm.loading.assembly.assemble`.

    Raises:
        UnsupportedModel: If transformers cannot make a model from the config.
    """
    model = empty_model(NAME, config, dtype)
    return assemble(model, DummyWeights(model), device=device, keeper=keeper)


def make_layers(config: PreTrainedConfig, *, dtype: torch.dtype, keeper: LayerKeeper) -> None:
    """Make the decoder's layers of a model of dummy weights, each for a keeper, and nothing else; see `make_model`."""
    model = empty_model(NAME, config, dtype)
    fill_layers(model, DummyWeights(model), keeper)


def make_first_layers(config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Make the first layers of a model of dummy weights, as many as include every kind of layer.

    They have the same values as in the whole model. The vocabulary is cut if the model allows it; see
    `flexgen_helm.loading.first_layers`.

    Args:
        config: The config of the whole model.
        dtype: The dtype of the weights. transformers keeps some modules in float32.
        device: The device for the model.

    Raises:
        UnsupportedModel: If transformers cannot make a model from the config, or it has no list of layers.
    """
    whole, few = empty_first_layers(NAME, config, dtype)
    model = whole if few is None else few.model
    return assemble(model, DummyWeights(model), device=device)


@contextmanager
def _seeded(part: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(part.encode()))
        yield
