"""Cut a traced layer at its opaque calls, compile what lies between them, and run both in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.model.compiled.trace import OpaqueCall, Traced, filled, opaque

OPAQUE = opaque._opoverload
Compiled = Callable[..., Sequence[Tensor]]
CompilePiece = Callable[[GraphModule], Compiled]
"""Returns what computes a graph of one output, a tuple of tensors; its inputs have their form in ``meta["val"]``."""


@dataclass(frozen=True)
class Step:
    """An opaque call, or a piece between such calls. Tensors have the numbers of their places in a list."""

    work: OpaqueCall | Compiled
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    freed: tuple[int, ...] = ()
    """Tensors that nothing reads afterwards."""


@dataclass(frozen=True)
class Program:
    """A compiled layer, for one form of its arguments and any weights."""

    traced: Traced
    steps: tuple[Step, ...]
    results: tuple[int, ...]
    """Numbers of the tensors among the outputs."""
    size: int
    """Number of tensors."""

    def run(self, layer: nn.Module, given: Sequence[Any], attention: Callable[..., Any]) -> Any:
        """Run a layer.

        Args:
            layer: A layer of the kind that was traced.
            given: Leaves of its arguments, of the form that was traced.
            attention: The attention function.

        Returns:
            What the layer returns.
        """
        held: list[Any] = [_parameter(layer, name) for name in self.traced.parameters]
        held += [leaf for leaf in given if isinstance(leaf, Tensor)]
        held += [None] * (self.size - len(held))
        for step in self.steps:
            inputs = [held[number] for number in step.inputs]
            if isinstance(step.work, OpaqueCall):
                held[step.outputs[0]] = step.work.run(layer, inputs, given, attention)
            else:
                for number, output in zip(step.outputs, step.work(*inputs), strict=True):
                    held[number] = output
            del inputs
            for number in step.freed:
                held[number] = None
        return filled(self.traced.outputs, self.traced.output_spec, [held[number] for number in self.results], given)


def compile_layer(traced: Traced, compile_piece: CompilePiece) -> Program:
    """Cut a traced layer into steps and compile its pieces.

    Raises:
        UnsupportedModel: If the graph has constants, which may differ between layers, or changes inputs in place.
    """
    nodes = list(traced.graph.graph.nodes)
    if any(node.op == "get_attr" for node in nodes):
        raise UnsupportedModel("a layer holds tensors that are neither parameters nor buffers")
    if any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in nodes):
        raise UnsupportedModel("a layer changes its arguments in place")
    *inner, output = nodes
    numbers = {node: number for number, node in enumerate(inner)}
    done = {node for node in inner if node.op == "placeholder"}
    steps: list[Step] = []

    def compute(wanted: Sequence[Node]) -> None:
        """Make a piece of all that can be computed now, if anything of it is wanted."""
        if set(wanted) <= done:
            return
        piece = _computable(inner, done)
        inputs = list(dict.fromkeys(x for node in piece for x in node.all_input_nodes if x in done))
        within = set(piece)
        outputs = [node for node in piece if any(user not in within for user in node.users)]
        work = compile_piece(_module(traced.graph, piece, inputs, outputs))
        steps.append(Step(work, tuple(numbers[x] for x in inputs), tuple(numbers[x] for x in outputs)))
        done.update(piece)

    for node in inner:
        if node.target is OPAQUE:
            compute(node.all_input_nodes)
            tensors = tuple(numbers[x] for x in node.args[0])
            steps.append(Step(traced.calls[node.args[1]], tensors, (numbers[node],)))
            done.add(node)
    compute(output.all_input_nodes)
    results = tuple(numbers[node] for node in output.args[0])
    return Program(traced, _freeing(steps, results), results, len(inner))


def _computable(nodes: Sequence[Node], done: set[Node]) -> list[Node]:
    """Nodes that need nothing but what is done and each other."""
    found: dict[Node, None] = {}
    for node in nodes:
        if node not in done and node.target is not OPAQUE and all(x in done or x in found for x in node.all_input_nodes):
            found[node] = None
    return list(found)


def _module(root: GraphModule, piece: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> GraphModule:
    graph, copies = Graph(), dict[Node, Node]()
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in piece:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return GraphModule(root, graph)


def _freeing(steps: Sequence[Step], results: Sequence[int]) -> tuple[Step, ...]:
    """The same steps, each of which frees what no later one reads."""
    kept, freeing = set(results), list[Step]()
    for step in reversed(steps):
        last = {*step.inputs, *step.outputs} - kept
        freeing.append(replace(step, freed=tuple(sorted(last))))
        kept |= last
    return tuple(reversed(freeing))


def _parameter(layer: nn.Module, name: str) -> Tensor:
    path, _, own = name.rpartition(".")
    found: Tensor = getattr(layer.get_submodule(path), own)
    return found
