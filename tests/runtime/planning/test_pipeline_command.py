"""The command `flexgen-helm plan --stages`: what it prints and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.planning.test_command import GEN_LEN, JOBS, config, machine, plan

__all__ = ["config", "machine"]


def pipelines(capsys: pytest.CaptureFixture[str], config: Path, machine: Path, *options: str) -> dict[str, Any]:
    assert plan(config, machine, "--json", *options) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_of_stages_over_a_network(config: Path, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = pipelines(capsys, config, machine, "--stages", "3", "--lanes", "2", "--network", "1Gbit/s,10ms")
    assert (found["model"], found["machine"], found["pays"], found["refused"]) == ("tiny", "cpu", 3, {})
    assert found["network"] == {"bytes_per_second": 1.25e8, "latency_seconds": 0.01}
    made = found["stages"]["3"]
    assert [stage["layers"] for stage in made["stages"]] == [[0, 1], [1, 2], [2, 3]]
    assert (made["lanes"], made["generated_tokens"]) == (2, JOBS * GEN_LEN)
    assert made["tokens_per_second"] == pytest.approx(JOBS * GEN_LEN / made["seconds"])
    # Each sweep passes the network three times, half of them at the same time as the other lane's.
    assert made["seconds"] >= made["sweeps"] / 2 * 0.03
    assert made["binding"] == "network latency"
    assert made["seconds_without_network"] < made["seconds_without_latency"] <= made["seconds"]


def test_auto_says_how_many_stages_pay(config: Path, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = pipelines(capsys, config, machine, "--stages", "auto")
    assert list(found["stages"]) == ["1", "2"], "a model of three layers"
    assert found["network"] is None
    assert plan(config, machine, "--stages", "auto", "--network", "1Mbit/s,1s") == 0
    text = capsys.readouterr().out
    assert "network: 0.001Gbit/s,1000ms" in text
    assert re.search(r"^2 stages: .* new tokens/s, 0\.\d+ times 1 stage, .*; network latency binds$", text, re.MULTILINE)
    assert "up to 1 stage pay; more add less than 5%" in text
    assert "stage 0: layers 0 to 2" in text


def test_words_of_a_pipeline(config: Path, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(config, machine, "--stages", "2", "--network", "1Gbit/s,1ms") == 0
    text = capsys.readouterr().out
    for line in ("2 stages: ", "with 2 stages and 2 sweeps in flight:", "  policy: gpu_batch_size=", "  stage 1: layers "):
        assert f"\n{line}" in text
    assert "without the network's latency" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--network", "1Gbit/s,1ms"), ("--network cannot be used without --stages", "--stages auto")),
        (("--lanes", "2", "--most-stages", "4"), ("--lanes, --most-stages cannot be used without --stages",)),
        (("--stages", "2", "--allow", "w4", "--plot", "plots"), ("--allow, --plot cannot be used with --stages 2",)),
        (("--stages", "2", "--most-stages", "3"), ("--most-stages cannot be used with --stages 2",)),
        (("--stages", "2", "--network", "fast"), ("'fast' cannot be read. Give its rate and its latency",)),
        (("--stages", "4"), ("3 layers cannot be divided into 4 stages",)),
        (("--stages", "2", "--max-memory", "host=1MiB"), ("Stage 0 of 2",)),
    ],
)
def test_mistakes_are_named_with_a_way_out(
    options: tuple[str, ...], words: tuple[str, ...], config: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(config, machine, *options) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


@pytest.mark.parametrize("value", ["none", "0"])
def test_numbers_of_stages_that_cannot_be_read(
    value: str, config: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        plan(config, machine, "--stages", value)
    assert error.value.code == 2
    assert value in capsys.readouterr().err
