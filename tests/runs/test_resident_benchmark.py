"""The benchmark of resident models, on a tiny model: sides that are installed answer alike, and one that fails is reported."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.resident_benchmark import __main__ as command
from flexgen_helm.runs.resident_benchmark.contenders import Measured, Task, gaps, run
from flexgen_helm.runs.resident_benchmark.report import as_dict, render
from flexgen_helm.runs.resident_benchmark.sides.generate_batch_side import in_order
from flexgen_helm.runs.resident_benchmark.sides.measure import measure
from tests.jobs import random_tokens
from tests.models import save_tiny
from tests.reference import Greedy, Reference


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = save_tiny("llama", tmp_path_factory.mktemp("models"))
    prompts = [random_tokens(seed, 5 + 3 * seed) for seed in range(4)]
    return Task("tiny", str(folder), "float32", [""] * 4, prompts, new_tokens=3, candidates=0, threads=1, repeats=2)


@pytest.fixture(scope="module")
def reference(task: Task) -> list[Greedy]:
    model = Reference(task.folder)
    return [model.greedy(prompt, task.new_tokens) for prompt in task.prompts]


@pytest.mark.parametrize(
    "name", ["engine", *(pytest.param(name, marks=pytest.mark.slow) for name in ("transformers", "generate_batch"))]
)
def test_a_side_answers_as_the_reference_does(name: str, task: Task, reference: list[Greedy], tmp_path: Path) -> None:
    found = run(name, sys.executable, task, tmp_path)
    assert isinstance(found, Measured), found
    assert found.tokens == [answer.token_ids for answer in reference]
    assert len(found.wall_s) == len(found.processor_s) == 2
    assert min(found.wall_s + found.processor_s) > 0
    assert found.load_s > 0
    assert found.setting


@pytest.mark.slow
def test_a_side_that_fails_says_why(task: Task, tmp_path: Path) -> None:
    found = run("engine", sys.executable, replace(task, folder=str(tmp_path / "nothing")), tmp_path)
    assert isinstance(found, str)
    assert "nothing" in found


def test_the_fastest_setting_is_measured() -> None:
    """Processor time decides, which the slow one spends."""
    calls: list[str] = []

    def slow(prompts: list[list[int]]) -> list[list[int]]:
        calls.append("slow")
        sum(range(3_000_000))
        return [[0]] * len(prompts)

    def fast(prompts: list[list[int]]) -> list[list[int]]:
        calls.append("fast")
        return [[1]] * len(prompts)

    found = measure({"slow": slow, "fast": fast}, [[1], [2], [3]], repeats=2)
    assert found["setting"] == "fast"
    assert found["tokens"] == [[1]] * 3
    assert found["tried_s"].keys() == {"slow", "fast"}
    assert calls == ["slow", "slow", "fast", "fast", "fast", "fast"]


def test_outputs_are_in_the_order_of_the_requests() -> None:
    assert in_order({f"req_{i}": i for i in (10, 2, 0)}) == [0, 2, 10]


def test_gaps_are_those_of_the_two_best_tokens(task: Task, reference: list[Greedy]) -> None:
    found = gaps(task.folder, task.prompts, [answer.token_ids for answer in reference])
    for gap, answer in zip(found, reference, strict=True):
        assert gap == pytest.approx(answer.margins, abs=1e-4)


def measured(tokens: list[list[int]], seconds: list[float]) -> Measured:
    return Measured(1.0, tokens, [2 * second for second in seconds], seconds, "blocks of 7", {})


def test_the_table_has_medians_ratios_and_differences(task: Task, reference: list[Greedy]) -> None:
    expected = [answer.token_ids for answer in reference]
    other = [[(token + 1) % 7 for token in expected[0]], *expected[1:]]
    found = {"engine": measured(expected, [3.0, 1.0, 2.0]), "vllm": measured(other, [5.0, 3.0, 9.0]), "lm_eval": "status 1: no"}
    entries = command.judged(task, expected, found)
    title, header, engine, vllm, failed = render("tiny", entries)
    assert (title, engine.split()[:6]) == ("tiny", ["engine", "2.0", "4.0", "1.00", "0/4", "0"])
    assert vllm.split()[:6] == ["vllm", "5.0", "10.0", "2.50", "1/4", "0"]
    assert failed.split() == ["lm_eval", "failed", "status", "1:", "no"]
    assert header.index("differ") < header.index("of them ties") < engine.index("blocks of 7")
    assert header.index("setting") == vllm.index("blocks of 7")
    plain = as_dict(entries)
    assert plain["lm_eval"] == {"failed": "status 1: no"}
    assert plain["vllm"]["answers"] == {"equal": 3, "ties": 0, "other": 1}


def test_what_is_not_installed_is_left_out_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    here = dict.fromkeys(["engine", "engine_compiled", "transformers", "generate_batch"], sys.executable)
    assert command.chosen(command.parse([])) == here
    assert re.search(r"lm_eval is not installed.*--lm-eval.*left out\.\nvllm is not.*--vllm", capsys.readouterr().out)
    assert command.chosen(command.parse(["--vllm", str(tmp_path)])) == {**here, "vllm": str(tmp_path)}
    assert list(command.chosen(command.parse(["--contenders", "engine"]))) == ["engine"]
    with pytest.raises(FlexGenError, match=r"vllm is not installed here.*--vllm"):
        command.chosen(command.parse(["--contenders", "engine", "vllm"]))
