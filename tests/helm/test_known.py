"""No engine where every answer is known, and one wherever anything that decides answers may have changed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helm.benchmark.model_deployment_registry import ClientSpec, get_model_deployment, register_model_deployment

from flexgen_helm import Engine, Policy
from flexgen_helm.cache_folder import cache_folder
from flexgen_helm.helm import known
from flexgen_helm.helm.console import Console
from flexgen_helm.helm.registry import ENGINES
from flexgen_helm.helm.run_record import RUN_FILE, WORKLOAD_FILE
from flexgen_helm.machine import identity
from tests.helm.conftest import RunSuite
from tests.helm.fakes import FakeLoader, run_spec
from tests.helm.files import FILES, read, timeless
from tests.models import save_tiny

DEPLOYMENT = "flexgen/test/folder"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for a model, with a deployment; nothing of other tests is known."""
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path / "known"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    deploy(name_or_path=str(folder))
    return folder


def deploy(**arguments: Any) -> None:
    letters = get_model_deployment("flexgen/test/letters")
    client = ClientSpec(letters.client_spec.class_name, arguments)
    register_model_deployment(replace(letters, name=DEPLOYMENT, model_name="test/folder", client_spec=client))


def spec(**options: Any) -> Any:
    return run_spec(deployment=DEPLOYMENT, **options)


def attempts_of_another_process(run_suite: RunSuite, loader: FakeLoader, *specs: Any) -> int:
    """Runs as a process does that has loaded nothing, and returns how often it loads an engine."""
    ENGINES.close()
    before = loader.attempts
    run_suite(list(specs) or [spec()])
    return loader.attempts - before


def test_no_engine_is_loaded_where_every_answer_is_known(run_suite: RunSuite, loader: FakeLoader, model: Path) -> None:
    first = run_suite([spec()], suite="first")
    assert attempts_of_another_process(run_suite, loader) == 0
    second = first.with_name("suite")
    for file in FILES:
        assert timeless(read(first, "generation", file)) == timeless(read(second, "generation", file))
    assert len(loader.engines) == 1
    reports = [read(suite, "generation", RUN_FILE) for suite in (first, second)]
    assert [report["requests"] for report in reports] == [{"total": 3, "computed": 3}, {"total": 3, "cached": 3}]
    assert [report["numerics"] for report in reports] == [asdict(loader.engine.numerics)] * 2
    # What is missing is computed, and only that.
    more = spec(words="apple pear plum fig cherry", max_eval_instances=5)
    assert attempts_of_another_process(run_suite, loader, more) == 1
    assert [len(jobs) for jobs in loader.engines[-1].runs] == [2]


def touched(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "config.json").write_text('{"other": "model"}')


def other_tokenizer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "tokenizer.json").write_text("{}")


def other_arguments(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(name_or_path=str(model), dtype="bfloat16")


def a_check_that_is_repeated(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(name_or_path=str(model), recheck=True)


def other_policy(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(name_or_path=str(model), policy={"gpu_batch_size": 32})


def other_code(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "code_identity", lambda: {"package": "changed"})


def other_library(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity.code_identity.cache_clear()
    monkeypatch.setattr(identity, "version", lambda name: f"{name} of tomorrow")


def other_threads(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)


def torn_record(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = cache_folder().glob("engines/*.json")
    record.write_text(record.read_text()[:20])


def changed_record(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = cache_folder().glob("engines/*.json")
    content = json.loads(record.read_text())
    content["record"]["bits_per_weight"] = 1.0
    record.write_text(json.dumps(content))


def no_record(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = cache_folder().glob("engines/*.json")
    record.unlink()


@pytest.fixture
def fresh_code() -> Iterator[None]:
    code_identity = identity.code_identity
    yield
    code_identity.cache_clear()


@pytest.mark.usefixtures("fresh_code")
@pytest.mark.parametrize(
    "change",
    [
        *(touched, other_tokenizer, other_arguments, other_policy, other_code, other_library, other_threads),
        *(torn_record, changed_record, no_record, a_check_that_is_repeated),
    ],
)
def test_an_engine_is_loaded_where_anything_is_uncertain(
    change: Any, run_suite: RunSuite, loader: FakeLoader, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_suite([spec()])
    change(model, monkeypatch)
    assert attempts_of_another_process(run_suite, loader) == 1


def test_an_engine_that_turns_out_otherwise_is_believed(
    run_suite: RunSuite, loader: FakeLoader, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that were found by what was recorded are not mixed with those of other numerics."""
    run_suite([spec()])
    loader.version = 2
    more = spec(words="apple pear plum cherry", max_eval_instances=4)
    assert attempts_of_another_process(run_suite, loader, more) == 1
    assert [len(jobs) for jobs in loader.engines[-1].runs] == [4]


def test_what_is_recalled_is_what_a_real_engine_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path / "known"))
    folder = save_tiny("llama", tmp_path)
    arguments: dict[str, Any] = {
        "name_or_path": str(folder),
        "device": "cpu",
        "policy": Policy(16, 1, 64),
        "kv_dtype": "bfloat16",
    }
    assert known.recall(arguments) is None
    with Engine.from_pretrained(**arguments) as engine:
        known.remember(arguments, engine.describe())
        assert known.recall(arguments) == engine.describe()
        assert known.recall({**arguments, "recheck": True}) is None
    assert known.recall({**arguments, "dummy_weights": True}) is None


def test_what_was_measured_outlives_a_cached_rerun(run_suite: RunSuite, loader: FakeLoader) -> None:
    suite = run_suite([run_spec()])
    first = read(suite, "generation", RUN_FILE)
    assert first["measured"]["stats"]["num_jobs"] == 3
    run_suite([run_spec()])
    second, (entry,) = read(suite, "generation", RUN_FILE), json.loads((suite / WORKLOAD_FILE).read_text())
    assert second["requests"] == {"total": 3, "cached": 3}
    assert second["measured"] == entry["measured"] == first["measured"]
    assert second["workload"]["date"] == entry["date"] > first["measured"]["date"]
    # Another deployment's figures are not taken for its own.
    report = suite / "generation" / RUN_FILE
    report.write_text(json.dumps({**second, "deployment": "flexgen/test/others"}))
    run_suite([run_spec()])
    assert read(suite, "generation", RUN_FILE)["measured"] is None


@pytest.mark.parametrize("damage", ["{", "[1]", '{"a": 1}', '[{"deployment": "old form"}]', ""])
def test_commands_on_one_suite_keep_each_others_reports(damage: str, run_suite: RunSuite, loader: FakeLoader) -> None:
    first = [run_spec(name="one"), run_spec(name="two")]
    suite = run_suite(first)
    run_suite([run_spec(name="three")])
    run_suite([run_spec(name="four", deployment="flexgen/test/others")])
    run_suite(first)
    found = [(one["deployment"].rpartition("/")[2], one["runs"]) for one in json.loads((suite / WORKLOAD_FILE).read_text())]
    assert found == [("letters", ["three"]), ("others", ["four"]), ("letters", ["one", "two"])]
    (suite / WORKLOAD_FILE).write_text(damage)
    run_suite(first)
    assert [one["runs"] for one in json.loads((suite / WORKLOAD_FILE).read_text())] == [["one", "two"]]


def test_the_console_gets_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen, now = io.StringIO(), iter(range(0, 1000, 12))
    console = Console(screen, clock=lambda: next(now))
    assert list(console.each(list("abcdefg"), "Adapting 7 runs")) == list("abcdefg")
    assert screen.getvalue().splitlines() == ["Adapting 7 runs: 2 of 7 are done", "Adapting 7 runs: 5 of 7 are done"]
