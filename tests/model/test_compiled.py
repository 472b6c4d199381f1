"""Layers cut at their products and attention: what is traced, when it is traced anew, what is freed, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten
from transformers import AttentionInterface

from flexgen_helm.errors import FlexGenError, UnsupportedModel
from flexgen_helm.model.compiled import inductor
from flexgen_helm.model.compiled.layers import CompiledLayers
from flexgen_helm.model.compiled.program import Step, compile_layer
from flexgen_helm.model.compiled.trace import OpaqueCall, trace

NAME = "flexgen_helm_test"


def shifted(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, *, scaling: float) -> tuple[Tensor, None]:
    """Stands for attention: what it is given is in its output."""
    assert isinstance(mask, Mask)
    return (q * scaling + k.flip(2) + v + mask.shift).transpose(1, 2), None


class Mask:
    """An object that only attention understands."""

    def __init__(self, shift: float) -> None:
        self.shift = shift


class Layer(nn.Module):
    """A layer of heads of 4 elements."""

    factor: Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("factor", torch.rand(width), persistent=False)
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, hidden: Tensor, turn: dict[str, Tensor], mask: Mask, *, extra: bool = False) -> Any:
        q, k, v = self.into(self.norm(hidden)).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        attend = AttentionInterface()[NAME]
        output, _ = attend(self, q * turn["cos"], k * turn["cos"], v, mask, scaling=0.5)
        found = hidden * self.factor + self.out(output.flatten(2)) * self.scale
        return (found, None, found.sum()) if extra else found


@pytest.fixture(autouse=True)
def attention() -> None:
    AttentionInterface.register(NAME, shifted)


def arguments(tokens: int = 5) -> tuple[Any, ...]:
    return torch.randn(1, tokens, 8), {"cos": torch.rand(tokens, 4)}, Mask(float(torch.rand(())))


class Counted(CompiledLayers):
    """Compiles nothing, and counts the pieces."""

    def __init__(self) -> None:
        self.pieces: list[GraphModule] = []
        super().__init__(self.keep)

    def keep(self, graph: GraphModule) -> Any:
        self.pieces.append(graph)
        return graph.forward


def test_weights_masks_and_numbers_are_those_of_each_call() -> None:
    layers, compiled = [Layer(), Layer()], Counted()
    for seed in range(4):
        torch.manual_seed(seed)
        given, layer = arguments(), layers[seed % 2]
        assert torch.equal(compiled.call(layer, 0, NAME, given, {}), layer(*given))
    assert len(compiled.pieces) == 4  # before the product, before attention, before the last product, behind it
    assert AttentionInterface()[NAME] is shifted
    assert all("forward" not in module.__dict__ for layer in layers for module in layer.modules())


def test_another_form_is_traced_anew() -> None:
    layer, compiled = Layer(), Counted()
    calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = [
        (0, arguments(), {}),
        (0, arguments(6), {}),
        (0, arguments(), {"extra": True}),
        (1, arguments(), {}),
        (0, (torch.randn(1, 8, 5).mT, *arguments()[1:]), {}),
    ]
    for number, (kind, given, options) in enumerate(calls, start=1):
        found, expected = (
            tree_flatten(x)[0] for x in (compiled.call(layer, kind, NAME, given, options), layer(*given, **options))
        )
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert len(compiled.pieces) == 4 * number


def test_nothing_is_held_longer_than_it_is_read() -> None:
    given = arguments()
    leaves, spec = tree_flatten((given, {}))
    program = compile_layer(trace(Layer(), leaves, spec, NAME), lambda graph: graph.forward)
    born = set(range(len(program.traced.parameters) + 2))
    for number, step in enumerate(program.steps):
        assert set(step.inputs) <= born
        born |= set(step.outputs)
        later = {x for other in program.steps[number + 1 :] for x in other.inputs} | set(program.results)
        assert not set(step.freed) & later
        born -= set(step.freed)
    assert born == set(program.results)
    assert [isinstance(step.work, OpaqueCall) for step in program.steps] == [False, True] * 3 + [False]


def test_opaque_calls_keep_their_order() -> None:
    """What a later call needs may be there before an earlier one is computed."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            first: Tensor = self.b(self.a(x).relu()).relu()
            last: Tensor = self.c(x * 2)
            return first + last

    leaves, spec = tree_flatten(((torch.randn(1, 3, 8),), {}))
    steps: tuple[Step, ...] = compile_layer(trace(Two(), leaves, spec, NAME), lambda graph: graph.forward).steps
    assert [step.work.path for step in steps if isinstance(step.work, OpaqueCall)] == ["a", "b", "c"]


class WithConstant(nn.Module):
    """Layers of one kind may hold other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = [torch.rand(8)]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[0]


class WithBranch(nn.Module):
    """What is computed depends on numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x


class InPlace(nn.Module):
    """What a product read before is changed, or the layer's argument."""

    def __init__(self, *, is_argument: bool) -> None:
        super().__init__()
        self.product, self.is_argument = nn.Linear(8, 8), is_argument

    def forward(self, x: Tensor) -> Tensor:
        changed = x if self.is_argument else x * 2
        before: Tensor = self.product(changed)
        return before + changed.add_(1)


def test_changes_in_place_come_after_what_reads_them() -> None:
    layer, given = InPlace(is_argument=False), (torch.randn(1, 3, 8),)
    assert torch.equal(Counted().call(layer, 0, NAME, given, {}), layer(*given))


@pytest.mark.parametrize("layer", [WithConstant(), WithBranch(), InPlace(is_argument=True)])
def test_what_a_graph_cannot_hold_is_refused(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedModel, match=r"a layer (cannot be traced|holds tensors|changes its arguments)"):
        Counted().call(layer, 0, NAME, (torch.randn(1, 3, 8),), {})


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(inductor, "inductor_compile", missing)
    with pytest.raises(
        FlexGenError, match=r"\(RuntimeError: No working C\+\+ compiler found\).*g\+\+.*leave compile_layers out"
    ):
        CompiledLayers(inductor.compile_piece).call(Layer(), 0, NAME, arguments(), {})


@pytest.mark.slow
def test_pythons_own_distutils_is_no_hindrance() -> None:
    """Seen once beside other libraries: setuptools found it in place of its own, and refused to be imported."""
    if sys.version_info >= (3, 12):
        pytest.skip("Python has no distutils of its own")
    code = "import _distutils_hack\n_distutils_hack.DistutilsMetaFinder.spec_for_distutils = lambda self: None\n"
    code += "import flexgen_helm.model.compiled.inductor"
    subprocess.run([sys.executable, "-c", code], check=True)
