"""Layers that are cut at their products and attention, which the CPU computes meanwhile; pieces run as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flexgen_helm.model.compiled.layers import CompiledLayers
from flexgen_helm.runtime import building
from flexgen_helm.types import Result
from tests.jobs import fixed_mix
from tests.simulated_gpu.engines import ON_HOST, answers
from tests.simulated_gpu.patches import simulated_gpu


@pytest.mark.usefixtures("one_check")
@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_cut_layers_answer_alike(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(building, "by_inductor", lambda: CompiledLayers(lambda graph: graph.forward))
    jobs, found = fixed_mix(3, 8), list[list[Result]]()
    for compile_layers in (False, True):
        with simulated_gpu() as gpu:
            found.append(answers(folder_of(family), ON_HOST, jobs, compile_layers=compile_layers))
        assert not gpu.faults
    assert found[0] == found[1]
