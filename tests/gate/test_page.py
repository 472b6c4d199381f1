"""docs/gate.md: its tables say what the code does, its YAML and commands parse, its pytest example runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexgen_helm.cli import main
from flexgen_helm.gate.config import SPECS, parse_config
from tests.gate.made import run_folders
from tests.reports.synthetic import Answer

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "gate.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
YAML = [yaml.safe_load(block) for language, block in BLOCKS if language == "yaml"]


def block(language: str) -> str:
    (found,) = [text for each, text in BLOCKS if each == language]
    return str(found)


def cells(first: str) -> list[str]:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {first}")]
    return [cell.strip() for cell in line.strip("| ").split("|")]


@pytest.mark.parametrize("gate", SPECS)
def test_the_table_of_gates_has_the_defaults(gate: str) -> None:
    shown, threshold = cells(f"`{gate}`")[1], SPECS[gate].threshold
    assert ("; off" in shown) is not SPECS[gate].enabled
    if isinstance(threshold, Mapping):
        assert shown == "by change"
    elif threshold is not None:
        (number, *_) = re.findall(r"\d[\d.]*", shown)
        assert float(number.rstrip(".")) == threshold


@pytest.mark.parametrize("change", ["same", "16-bit", "8-bit", "low-bit"])
def test_the_table_of_changes_has_the_defaults(change: str) -> None:
    names = [name.strip("`") for name in cells("candidate")[1:]]
    for name, value in zip(names, cells(change)[1:], strict=True):
        threshold = SPECS[name].threshold
        assert isinstance(threshold, Mapping)
        assert threshold[change] == float(value)


def test_the_configuration_is_valid() -> None:
    config = parse_config(YAML[0])
    assert config.rules["margin"].required
    assert not config.rules["length"].enabled
    of_ci = yaml.safe_load((ROOT / ".ci" / "small_suite" / "gate.yaml").read_text())
    assert parse_config(of_ci).rules["lossless"].required


def test_the_workflow_and_the_commands_parse(capsys: pytest.CaptureFixture[str]) -> None:
    steps = YAML[1]["jobs"]["gate"]["steps"]
    commands = [step["run"] for step in steps if "run" in step] + block("sh").splitlines()
    checks = [shlex.split(command)[1:] for command in commands if command.startswith("flexgen-helm")]
    assert {words[0] for words in checks} == {"eval", "check"}
    for words in checks:
        with pytest.raises(SystemExit) as ended:  # --help ends a command whose options before it are known
            main([*words, "--help"])
        assert ended.value.code == 0
    assert "RUNS|FILE" in capsys.readouterr().out


def test_the_pytest_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    run_folders(Path("before"))
    assert main(["check", "--baseline", "before", "--record", "baseline.json"]) == 0
    Path("gate.yaml").write_text("gates: {lossless: true}\n")
    names: dict[str, Any] = {}
    exec(block("python"), names)
    run_folders(Path("after/runs/quickstart"))
    names["test_no_regression"]()
    run_folders(Path("worse/runs/quickstart"), answers=[Answer(text="B", score=0.0)] * 20)
    Path("after").rename("kept")
    Path("worse").rename("after")
    with pytest.raises(AssertionError, match="REGRESSION"):
        names["test_no_regression"]()
