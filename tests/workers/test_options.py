"""How many workers, and where: what users say, and what they are told."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path

import pytest

from flexgen_helm.cli import main
from flexgen_helm.errors import FlexGenError
from flexgen_helm.evaluation.commands import Evaluation, environment, run_command
from flexgen_helm.evaluation.suites import find_suite
from flexgen_helm.workers.options import RUNNER, Workers


@pytest.mark.parametrize("workers", [Workers(2), Workers(3, 0.5), Workers(1, 0.0, "auto"), Workers(4, 1.0, "head:6379")])
def test_variables_say_the_same(workers: Workers) -> None:
    assert Workers.named_by(workers.variables) == workers


@pytest.mark.parametrize("variables", [{}, {"COUNT": "two"}, {"COUNT": "0"}, {"GPUS": "-1"}, {"GPUS": "nan"}, {"GPUS": "one"}])
def test_variables_that_name_no_numbers(variables: dict[str, str]) -> None:
    named = {"FLEXGEN_HELM_WORKERS": variables.get("COUNT", "2" if variables else "")}
    named |= {"FLEXGEN_HELM_GPUS_PER_WORKER": variables["GPUS"]} if "GPUS" in variables else {}
    with pytest.raises(FlexGenError, match="FLEXGEN_HELM_WORKERS"):
        Workers.named_by(named)


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FlexGenError, match=r"pip install \"flexgen_helm\[ray\]\""):
        Workers(2).check()


@pytest.fixture
def with_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.usefixtures("with_ray")
def test_addresses() -> None:
    Workers(2).check()
    Workers(2, address="auto").check()
    for address in ("ray://head:10001", "head", "head:port", ""):
        with pytest.raises(FlexGenError, match="no address of a Ray cluster"):
            Workers(2, address=address).check()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        Workers(2, address=f"127.0.0.1:{port}").check()
    with pytest.raises(FlexGenError, match=rf"no Ray cluster at 127.0.0.1:{port} .*ray start --head"):
        Workers(2, address=f"127.0.0.1:{port}").check()


def test_helm_run_gets_the_runner_and_the_variables(tmp_path: Path) -> None:
    alone = Evaluation("flexgen/a/b", find_suite("quickstart"), tmp_path, 1)
    several = Evaluation("flexgen/a/b", find_suite("quickstart"), tmp_path, 1, workers=Workers(2, 0.5))
    changed = [(a, b) for a, b in zip(run_command(alone), run_command(several), strict=True) if a != b]
    assert changed == [("flexgen_helm.helm.runner.FlexGenRunner", RUNNER)]
    assert environment(several) == environment(alone) | Workers(2, 0.5).variables


@pytest.mark.parametrize("option", ["--workers=0", "--workers=two", "--gpus-per-worker=-1", "--gpus-per-worker=nan"])
def test_numbers_of_the_command(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "--model", "m", "--suite", "quickstart", "--workers=2", option])
    assert "is not a number" in capsys.readouterr().err


def test_options_of_workers_without_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--gpus-per-worker=1", "--ray-address=auto"):
        assert main(["eval", "--model", "org/m", "--suite", "quickstart", "--out", str(tmp_path), option]) == 2
        assert "Give --workers N too" in capsys.readouterr().err
    assert not os.listdir(tmp_path)
