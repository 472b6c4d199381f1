"""Trace a call of a layer into a graph of torch operators, in which products, experts and attention are opaque calls.

Opaque calls are those that another library computes, that must not depend on the form of the graph, or that suspend the call of
the layer. They are run as they are without a compiler, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.model.linear import TOKENWISE, has_experts

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
"""Arguments that are part of the graph. Other objects are only handed on to opaque calls."""


class Leaf(NamedTuple):
    """Where an argument of an opaque call, or a part of the layer's output, comes from."""

    source: Literal["tensor", "given", "constant"]
    """The graph; the arguments of the layer; or nowhere, it is always the same."""
    value: Any
    """Its number among the tensors, or among the leaves of the layer's arguments; the constant itself."""


def filled(leaves: Sequence[Leaf], spec: TreeSpec, tensors: Sequence[Tensor], given: Sequence[Any]) -> Any:
    """Return the structure that leaves describe.

    Args:
        leaves: Its leaves.
        spec: The structure.
        tensors: The tensors among its leaves.
        given: Leaves of the layer's arguments.
    """
    sources = {"tensor": tensors, "given": given}
    return tree_unflatten([x.value if x.source == "constant" else sources[x.source][x.value] for x in leaves], spec)


@dataclass(frozen=True)
class OpaqueCall:
    """A call of a module, or of the model's attention function, that stays as it is."""

    path: str
    """Name of the module within the layer."""
    is_attention: bool
    """Whether the attention function is called with the module, and not the module itself."""
    spec: TreeSpec
    """Structure of positional and keyword arguments."""
    arguments: tuple[Leaf, ...]
    """Their leaves."""

    def run(self, layer: nn.Module, tensors: Sequence[Tensor], given: Sequence[Any], attention: Callable[..., Any]) -> Tensor:
        """Call it.

        Args:
            layer: The layer to which its module belongs.
            tensors: Tensors among its arguments.
            given: Leaves of the layer's arguments.
            attention: The attention function, as transformers' interface calls it.
        """
        args, kwargs = filled(self.arguments, self.spec, tensors, given)
        module = layer.get_submodule(self.path)
        output: Tensor = attention(module, *args, **kwargs)[0] if self.is_attention else module(*args, **kwargs)
        return output.contiguous()  # as the graph expects it


@dataclass(frozen=True)
class Traced:
    """A graph whose inputs are parameters, then the tensors among the layer's arguments."""

    graph: GraphModule
    parameters: tuple[str, ...]
    """Names of the layer's parameters and buffers that are inputs."""
    calls: tuple[OpaqueCall, ...]
    """Opaque calls, in the order in which the layer makes them; `opaque` in the graph has their number."""
    outputs: tuple[Leaf, ...]
    """Leaves of what the layer returns."""
    output_spec: TreeSpec


@torch.library.custom_op("flexgen_helm::opaque", mutates_args=())
def opaque(tensors: list[Tensor], number: int, shape: list[int], like: int) -> Tensor:
    """Stand for an opaque call in a graph.

    Args:
        tensors: Tensors among its arguments.
        number: Its number.
        shape: Shape of its output, which is contiguous.
        like: Number of the tensor that has the output's dtype.
    """
    raise AssertionError("opaque calls are taken out of the graph")


@opaque.register_fake
def _(tensors: list[Tensor], number: int, shape: list[int], like: int) -> Tensor:
    return tensors[like].new_empty(shape)


def trace(layer: nn.Module, leaves: Sequence[Any], spec: TreeSpec, attention: str) -> Traced:
    """Trace a layer.

    Args:
        layer: The layer, with its parameters on the device that computes.
        leaves: Leaves of ``(args, kwargs)`` with which it is called.
        spec: Their structure.
        attention: Name of the attention function in transformers' registry.

    Raises:
        UnsupportedModel: If the layer does anything that cannot be traced.
    """
    opaques = {path: module for path, module in layer.named_modules() if _is_opaque(module)}
    held = dict(chain(layer.named_parameters(), layer.named_buffers()))
    parameters = {name: x for name, x in held.items() if not any(name.startswith(f"{path}.") for path in opaques)}
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    tracer = _Tracer(layer, leaves)
    returned: list[tuple[tuple[Leaf, ...], TreeSpec]] = []

    def run(values: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        args, kwargs = tree_unflatten(tracer.given(inputs), spec)
        output = functional_call(layer, dict(zip(parameters, values, strict=True)), args, kwargs, strict=False)
        found, structure = tree_flatten(output)
        returned.append((tracer.described(found), structure))
        return [x for x in found if isinstance(x, Tensor)]

    try:
        with (
            _disable_current_modes(),  # which must not see what is traced
            torch.inference_mode(False),
            torch.no_grad(),
            FakeTensorMode(),
            tracer.installed(opaques, attention),
        ):
            # Nothing changes in place, so that steps may come in another order.
            graph = make_fx(functionalize(run))(_alike(parameters.values()), _alike(tensors))
    except UnsupportedModel:
        raise
    except Exception as error:
        raise UnsupportedModel(f"a layer cannot be traced ({type(error).__name__}: {str(error).splitlines()[0]})") from error
    graph.graph.eliminate_dead_code()
    return Traced(graph, tuple(parameters), tuple(tracer.calls), *returned[0])


@dataclass
class _Tracer:
    """Makes opaque calls nodes of the graph while a layer is traced."""

    layer: nn.Module
    leaves: Sequence[Any]
    calls: list[OpaqueCall] = field(default_factory=list)

    def given(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The leaves of the layer's arguments, with these tensors for its own."""
        rest = iter(tensors)
        return [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]

    @contextmanager
    def installed(self, opaques: Mapping[str, nn.Module], attention: str) -> Iterator[None]:
        """Put nodes in the place of modules and of the attention function."""
        paths = {module: path for path, module in self.layer.named_modules()}
        registry = AttentionInterface()
        own = registry.get(attention)

        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            shape = [q.shape[0], q.shape[2], q.shape[1], v.shape[3]]
            return self._node(paths[module], True, shape, 2, (q, k, v, *args), kwargs), None

        try:
            for path, module in opaques.items():
                module.__dict__["forward"] = self._forward(path, module)
            if own is not None:
                AttentionInterface.register(attention, attend)
            yield
        finally:
            for module in opaques.values():
                module.__dict__.pop("forward", None)
            if own is not None:
                AttentionInterface.register(attention, own)

    def _forward(self, path: str, module: nn.Module) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            width = x.shape[-1] if has_experts(module) else module.nf if isinstance(module, Conv1D) else module.out_features
            return self._node(path, False, [*x.shape[:-1], int(width)], 0, (x, *args), kwargs)  # type: ignore[arg-type]

        return forward

    def _node(
        self, path: str, is_attention: bool, shape: list[int], like: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        leaves, spec = tree_flatten((args, kwargs))
        self.calls.append(OpaqueCall(path, is_attention, spec, self.described(leaves)))
        output: Tensor = opaque([x for x in leaves if isinstance(x, Tensor)], len(self.calls) - 1, shape, like)
        return output

    def described(self, leaves: Sequence[Any]) -> tuple[Leaf, ...]:
        """Where leaves come from."""
        numbers = count()
        return tuple(Leaf("tensor", next(numbers)) if isinstance(x, Tensor) else self._described(x) for x in leaves)

    def _described(self, value: Any) -> Leaf:
        if isinstance(value, PLAIN):
            return Leaf("constant", value)
        for number, leaf in enumerate(self.leaves):
            if leaf is value:
                return Leaf("given", number)
        raise UnsupportedModel(f"a layer makes a {type(value).__name__} of its own for attention or experts")


def _is_opaque(module: nn.Module) -> bool:
    return type(module).forward in TOKENWISE or has_experts(module)


def _alike(tensors: Any) -> list[Tensor]:
    """Tensors of the same form without content."""
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in tensors]
