"""Errors layer by layer, against transformers' own hidden states and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexgen_helm import Engine, Policy
from flexgen_helm.errors import FlexGenError
from flexgen_helm.fidelity.layers import costliest, layer_errors
from tests.jobs import random_tokens
from tests.workbench import NARROW, POLICY, Workbench

TOKENS = random_tokens(6, 50)
WRONG = 1
"""The layer of which the candidate's weights are wrong."""


@pytest.fixture(scope="module", params=["llama", "lfm2"])
def family(request: pytest.FixtureRequest) -> str:
    """One in packed rows, one in single rows."""
    return str(request.param)


@pytest.fixture(scope="module")
def changed(bench: Workbench, family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a family with 10 % more in the matrices of one layer."""
    model: Any = AutoModelForCausalLM.from_pretrained(bench.folder(family))
    with torch.no_grad():
        for parameter in model.model.layers[WRONG].parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.1)
    folder = tmp_path_factory.mktemp("changed")
    model.save_pretrained(folder)
    return folder


def relative(right: torch.Tensor, other: torch.Tensor) -> float:
    return float((other - right).norm() / right.norm())


def expected_output(right: Any, other: Any) -> float:
    """What the wrong layer of transformers gives for the right input, called by the right model."""
    seen: list[torch.Tensor] = []
    ids = torch.tensor([TOKENS])
    hook = right.model.layers[WRONG].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode():
        right(ids, use_cache=False)
        hook.remove()
        right.model.layers[WRONG].load_state_dict(other.model.layers[WRONG].state_dict())
        right.model.layers[WRONG].register_forward_hook(
            lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        right(ids, use_cache=False)
    return relative(*seen)


@pytest.mark.parametrize("on_disk", [False, True])
def test_errors_are_those_of_the_wrong_layer(
    bench: Workbench, family: str, changed: Path, on_disk: bool, tmp_path: Path
) -> None:
    policy: Policy = POLICY
    if on_disk:
        policy = Policy(NARROW.gpu_batch_size, 1, gpu_batch_tokens=NARROW.gpu_batch_tokens, weights=(0, 0, 1))
    reference, candidate = (
        Engine.from_pretrained(str(folder), device="cpu", policy=policy, offload_folder=tmp_path / name)
        for name, folder in (("reference", bench.folder(family)), ("candidate", changed))
    )
    with reference, candidate:
        found = layer_errors(reference, candidate, TOKENS)
    right, other = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (bench.folder(family), changed))
    pairs = zip(right.model.layers[WRONG].parameters(), other.model.layers[WRONG].parameters(), strict=True)
    weights = [torch.cat([each.detach().flatten() for each in side]) for side in zip(*pairs, strict=True)]
    layers = found["layers"]
    assert found["embedding"] == 0
    assert layers[WRONG]["weights"] == pytest.approx(relative(*weights), rel=1e-4)
    assert layers[WRONG]["output"] == pytest.approx(expected_output(right, other), rel=1e-3)
    assert {(layer["weights"], layer["output"]) for layer in layers if layer["layer"] != WRONG} == {(0, 0)}
    assert costliest(found)[0]["layer"] == WRONG


def test_rounding_shows_in_every_layer(bench: Workbench, family: str) -> None:
    """bfloat16 has 8 bits: the relative error of a rounded number is at most 2**-9 of its power of two."""
    found = layer_errors(bench.engine(family), bench.engine(family, dtype="bfloat16"), TOKENS)
    for layer in found["layers"]:
        assert 2**-12 < layer["weights"] < 2**-8
        assert 2**-12 < layer["output"] < 2**-4


def test_the_engines_go_on_as_before(bench: Workbench, family: str) -> None:
    engine = bench.engine(family)
    (before,) = engine.final_hidden([TOKENS])
    with engine.layer_weights(0) as weights:
        assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert torch.equal(engine.final_hidden([TOKENS])[0], before)


def test_other_rows_are_refused(bench: Workbench) -> None:
    with pytest.raises(FlexGenError, match="packed and single rows"):
        layer_errors(bench.engine("llama"), bench.engine("llama", rows="single"), TOKENS)
