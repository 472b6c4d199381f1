"""`flexgen_helm.evaluate`: HELM in this process gives what its commands give, loads once, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexgen_helm import EvaluationFailed, FlexGenError, Policy, evaluate
from flexgen_helm.cli import main
from flexgen_helm.evaluation.choices import plain_choices
from flexgen_helm.helm import registry
from flexgen_helm.helm.workload import Workload
from flexgen_helm.reports.runs import Run

ENTRY = '{description: "dyck_language:num_parenthesis_pairs=%d,model=text", priority: 1}'
UNKNOWN = '{description: "custom_mcqa:path=/no/such/file.jsonl,model=text", priority: 1}'


def write(folder: Path, *entries: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run_entries.conf").write_text(f"entries: [{', '.join(entries)}]")
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Arguments of each engine that is loaded."""
    loaded: list[dict[str, Any]] = []
    real = registry.load_engine

    def load(arguments: dict[str, Any], **options: Any) -> Any:
        loaded.append(arguments)
        return real(arguments, **options)

    monkeypatch.setattr(registry, "load_engine", load)
    yield loaded
    registry.ENGINES.close()


def state() -> tuple[Any, ...]:
    """What HELM changes in its own process."""
    loggers = [logging.getLogger(name) for name in ("helm", None, "flexgen_helm")]
    return (
        [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers],
        (sys.stdout, sys.stderr),
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),
    )


def test_calls_share_an_engine_and_leave_nothing_behind(
    tiny_model: Path, tmp_path: Path, loads: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    suite, out = write(tmp_path / "brackets", ENTRY % 2), tmp_path / "out"
    before = state()
    scores = evaluate(tiny_model, suite=suite, max_instances=3, out=out)
    assert state() == before
    _, said = capfd.readouterr()
    assert f"Loading {tiny_model}\n" in said
    assert "Serving 1 runs of" not in said

    frame, paths = scores
    (name,) = frame.index
    row = frame.loc[name]
    stats = json.loads((paths.runs[name] / "stats.json").read_text())
    (expected,) = [s["mean"] for s in stats if s["name"] == {"name": "exact_match_indicator", "split": "test"}]
    assert (row.metric, row.score, row.instances, row.requests) == ("exact_match_indicator", expected, 3, 3)
    assert "Serving 1 runs of flexgen/" in paths.log.read_text()
    assert paths.suite == out / "runs" / "brackets"
    assert "exact_match_indicator" in scores._repr_html_()
    assert f"Prompt tokens: {row.prompt_tokens:,} asked" in str(scores)

    other = evaluate(tiny_model, suite=write(tmp_path / "more", ENTRY % 3), max_instances=2, out=out)
    assert list(other.frame.index) == ["dyck_language_np=3"]
    assert len(loads) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("loads")
def test_the_command_finds_the_same(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    suite, out = write(tmp_path / "brackets", ENTRY % 2), tmp_path / "out"
    scores = evaluate(tiny_model, suite=suite, max_instances=3, out=out)
    (name,) = scores.frame.index
    capfd.readouterr()
    command = ["eval", "--model", str(tiny_model), "--suite", str(suite), "-m", "3", "--out", str(tmp_path / "by_command")]
    assert main(command) == 0
    printed = capfd.readouterr().out
    assert scores.summary.splitlines()[:2] == [line for line in printed.splitlines() if line.startswith(("run entry", "dyck"))]
    for line in scores.commands:
        assert line.replace(str(out), str(tmp_path / "by_command")) in printed
    (theirs,) = [request.completions for request in Run(next((tmp_path / "by_command").glob("runs/*/dyck*"))).requests()[:1]]
    (ours,) = [request.completions for request in Run(scores.paths.runs[name]).requests()[:1]]
    assert [(each.text, each.logprob) for each in ours] == [(each.text, each.logprob) for each in theirs]


@pytest.mark.slow
@pytest.mark.usefixtures("loads")
def test_a_failure_says_what_the_command_says_and_the_same_call_continues(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, out = write(tmp_path / "brackets", ENTRY % 2, UNKNOWN), tmp_path / "out"
    with pytest.raises(EvaluationFailed) as failed:
        evaluate(tiny_model, suite=suite, max_instances=2, out=out)
    text = str(failed.value)
    assert text.startswith("helm-run ended with status 1, 1 runs are complete. Call evaluate in the same way again to continue")
    assert "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/file.jsonl'" in text
    assert failed.value.scores is not None
    assert list(failed.value.scores.frame.index) == ["dyck_language_np=2"]

    write(suite, ENTRY % 3)
    store = Workload._store

    def interrupt(self: Workload, responses: Any) -> None:
        if responses:
            raise KeyboardInterrupt
        store(self, responses)

    with monkeypatch.context() as patch:
        patch.setattr(Workload, "_store", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(tiny_model, suite=suite, max_instances=2, out=out)
    evaluate(tiny_model, suite=suite, max_instances=2, out=out)
    (record,) = [json.loads(file.read_text())["requests"] for file in out.glob("runs/*/dyck*np=3*/flexgen.json")]
    assert record == {"total": 2, "resumed": 2}


def test_options_of_an_earlier_call_do_not_stay(tiny_model: Path, tmp_path: Path, loads: list[dict[str, Any]]) -> None:
    suite = write(tmp_path / "brackets", ENTRY % 2)
    for number, options in enumerate(({"max_memory": {"device": "1GiB"}}, {})):
        evaluate(tiny_model, suite=suite, max_instances=1, out=tmp_path / str(number), **options)  # type: ignore[arg-type]
    assert [arguments.get("max_memory") for arguments in loads] == [{"device": "1GiB"}, None]


def test_options_become_plain_data(tmp_path: Path) -> None:
    given = {
        "dtype": "auto",
        "policy": Policy(auto=True, weights=(0.5, 0.5, 0.0)),
        "max_memory": "device=1GiB,host=2GiB",
        "offload_folder": tmp_path,
        "recheck": False,
    }
    expected = {
        "policy": {"auto": True, "weights": [0.5, 0.5, 0.0]},
        "max_memory": {"device": "1GiB", "host": "2GiB"},
        "offload_folder": str(tmp_path),
    }
    assert plain_choices(given) == expected
    assert plain_choices({"policy": "prefetch=2"}) == plain_choices({"policy": {"prefetch": 2}}) == {"policy": {"prefetch": 2}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtpye": "float32"}, r"no option `dtpye`. Did you mean `dtype`\?"),
        ({"dtype": "float99"}, r"dtype is 'float99'. Give one of auto, float32"),
        ({"max_instances": 0}, r"max_instances is 0. Give a number of at least 1"),
        ({"profile": "no/such.json"}, "no/such.json"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(FlexGenError, match=message):
        evaluate(tiny_model, suite=write(tmp_path / "s", ENTRY % 2), out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_missing_helm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FlexGenError, match=r'Install it with `pip install "flexgen_helm\[helm\]"`'):
        evaluate("m", suite="quickstart")
