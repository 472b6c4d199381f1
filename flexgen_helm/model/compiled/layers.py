"""Compiled layers of a model: a program for each kind of layer and form of its arguments, made at the first call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten
from transformers import AttentionInterface

from flexgen_helm.model.compiled.program import CompilePiece, Program, compile_layer
from flexgen_helm.model.compiled.trace import PLAIN, trace

logger = logging.getLogger(__name__)

Key = tuple[int, TreeSpec, tuple[Any, ...]]


class CompiledLayers:
    """Runs layers as programs. Layers of one kind share them, whatever their weights are and wherever they lie."""

    def __init__(self, compile_piece: CompilePiece) -> None:
        """Compile nothing yet.

        Args:
            compile_piece: The compiler.
        """
        self._compile_piece = compile_piece
        self._programs: dict[Key, Program] = {}

    def call(self, layer: nn.Module, kind: int, attention: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer.

        Args:
            layer: The layer, with its parameters on the device that computes.
            kind: Number of the first layer of its kind (`flexgen_helm.model.layers.layer_kinds`).
            attention: Name of the attention function in transformers' registry.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Returns:
            What the layer returns.

        Raises:
            UnsupportedModel: If it does anything that cannot be traced.
            FlexGenError: If the compiler fails.
        """
        leaves, spec = tree_flatten((args, kwargs))
        key = (kind, spec, _form(leaves))
        program = self._programs.get(key)
        if program is None:
            if not self._programs:
                logger.info("layers are compiled, which takes up to a minute once on a machine, and seconds later")
            program = self._programs[key] = compile_layer(trace(layer, leaves, spec, attention), self._compile_piece)
        return program.run(layer, leaves, AttentionInterface()[attention])


def by_inductor() -> CompiledLayers:
    """Return layers that torch's compiler compiles, which is imported now, since that takes seconds."""
    from flexgen_helm.model.compiled.inductor import compile_piece

    return CompiledLayers(compile_piece)


def _form(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Everything about arguments that a program depends on."""
    return tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
        if isinstance(leaf, Tensor)
        else leaf
        if isinstance(leaf, PLAIN)
        else type(leaf)
        for leaf in leaves
    )
