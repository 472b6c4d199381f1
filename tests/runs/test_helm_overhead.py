from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.runs.helm_overhead.__main__ import Measured, exponents, table
from flexgen_helm.runs.helm_overhead.sampled import LOADING, START, STEPS, TIMED, WAITING, WAITS, find_step, step_of

PATTERNS = [pattern for patterns in STEPS.values() for pattern in patterns] + [*WAITS]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_functions_of_steps_exist(pattern: str) -> None:
    module_name, function = pattern.split(":")
    if module_name == "*":
        return
    package = importlib.import_module(module_name.removesuffix(".*"))
    names = [package.__name__]
    if module_name.endswith(".*"):
        names = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    if function == "*":
        return
    modules = [importlib.import_module(name) for name in names if "efficiency" in name or not module_name.endswith(".*")]
    modules = modules or [importlib.import_module(name) for name in names]
    owners = [owner for module in modules for owner in (module, *(v for v in vars(module).values() if isinstance(v, type)))]
    assert any(hasattr(owner, function) for owner in owners)


def stack(*names: str) -> Any:
    """Returns the innermost of some frames, given from the outermost on."""
    frame = None
    for name in names:
        module, function = name.split(":")
        frame = SimpleNamespace(f_globals={"__name__": module}, f_code=SimpleNamespace(co_name=function), f_back=frame)
    return frame


def test_innermost_known_function_decides() -> None:
    run_all, run_one = "flexgen_helm.helm.runner:run_all", "helm.benchmark.runner:run_one"
    metric = "helm.benchmark.metrics.basic_metrics:evaluate"
    assert step_of(stack("__main__:main", "helm.benchmark.run:helm_run")) == START
    assert step_of(stack(run_all, "flexgen_helm.runtime.run:_finished")) == WAITING
    assert step_of(stack(run_all, run_one, "json:dumps")) == "writing"
    assert step_of(stack(run_all, run_one, metric, "flexgen_helm.helm.tokenizer:tokenize")) == "metrics"
    assert step_of(stack(run_all, "flexgen_helm.helm.workload:run", "flexgen_helm.helm.response_cache:lookup")) == "lookup"
    assert (
        step_of(stack(run_all, "flexgen_helm.helm.workload:run", "flexgen_helm.helm.response_cache:write"))
        == "journal and cache"
    )


def test_loading_is_loading_whatever_it_calls() -> None:
    load = "flexgen_helm.helm.registry:load_engine"
    assert find_step("flexgen_helm.generation.prepare:prepare") == "conversion"
    assert step_of(stack("flexgen_helm.helm.runner:run_all", load, "flexgen_helm.generation.prepare:prepare")) == LOADING


@pytest.mark.parametrize("name", [name for names in TIMED.values() for name in names])
def test_methods_that_are_timed_exist(name: str) -> None:
    module, _, path = name.partition(":")
    owner, method = path.split(".")
    assert callable(getattr(getattr(importlib.import_module(module), owner), method))


def measured(requests: int, power: float) -> Measured:
    times = {"metrics": 0.01 * requests, "scheduling": 0.001 * requests**power, "loading": 3.0, "lookup": 1e-6 * requests}
    return Measured("runner", False, requests, 1.0, {}, times, None, 0)


def test_exponents_are_those_of_the_times() -> None:
    found = exponents(measured(1000, 1.5), measured(4000, 1.5))
    assert found == {"metrics": pytest.approx(1), "scheduling": pytest.approx(1.5), "loading": pytest.approx(0)}


def test_one_size_has_no_growth() -> None:
    assert "-" in table([measured(1000, 1.5)])[1]


def test_table_names_what_grows_faster_than_linearly() -> None:
    lines = table([measured(1000, 1.5), measured(2000, 1.5), measured(4000, 1.5)])
    assert [line.split()[0] for line in lines if "faster than linear" in line] == ["scheduling"]
    (line,) = (line for line in lines if line.startswith("metrics"))
    assert line.split() == ["metrics", "10.00", "20.00", "40.00", "1.00", "1.00", "1.00"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_command_from_end_to_end(tmp_path: Path) -> None:
    try:
        smollm2_folder()
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "flexgen_helm.runs.helm_overhead", "--json", str(tmp_path / "result.json")]
    command += ["--requests", "32", "64"]
    subprocess.run(command, check=True, capture_output=True)
    suites = json.loads((tmp_path / "result.json").read_text())["suites"]
    assert [(suite["route"], suite["cache"], suite["requests"], suite["locked"]) for suite in suites] == [
        ("runner", False, 32, 0),
        ("runner", False, 64, 0),
        ("runner", True, 64, 0),
        ("client", True, 64, 0),
    ]
    for suite in suites:
        assert 0 < sum(suite["steps_s"].values()) <= suite["wall_s"]
        # The client's own threads are not looked at.
        main = {"adaptation", "loading", "metrics", "writing"} if suite["route"] == "runner" else set()
        assert {"layers", "logits", "scheduling", *main} <= set(suite["processor_s"])
