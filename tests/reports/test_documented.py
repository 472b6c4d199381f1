"""The commands and the snippet of docs/reports.md, on runs as the page's evaluations would leave them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm.cli import main
from flexgen_helm.reports.figures import LEAST_CLUSTERS
from flexgen_helm.reports.presentation.page import MOST_FLIPS
from flexgen_helm.reports.presentation.words import FIGURES
from tests.reports.synthetic import Answer, Suite

TEXT = (Path(__file__).parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path / "cache"))
    for variant, score in (("", 1.0), ("@w4", 0.0)):
        suite = Suite(tmp_path / "benchmark_output/runs/quickstart", f"flexgen/{tmp_path}/path/to/model{variant}")
        suite.run("mmlu:subject=a", [Answer(score=score), Answer()])
    return tmp_path


def test_the_commands_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL) for line in block.splitlines()]
    reports = [shlex.split(command)[1:] for command in commands if command.startswith("flexgen-helm report")]
    assert reports
    # Evaluations and the suite have tests of their own.
    others = ("flexgen-helm eval", "python -m flexgen_helm.runs.accuracy_vs_compression")
    assert all(command.startswith(("flexgen-helm report", *others)) for command in commands)
    for arguments in reports:
        assert main(arguments) == 0
        assert "report: report/report.html" in capsys.readouterr().out
    described = set(re.findall(r"`(\w+\.\w+)`", TEXT[TEXT.index("## Files") : TEXT.index("## The figures")]))
    assert described == {path.name for path in (folder / "report").iterdir() if path.suffix not in (".png", ".svg")}


def test_the_snippet_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(snippet, "reports.md", "exec"), names)
    assert "@w4" in capsys.readouterr().out


def test_every_figure_is_described() -> None:
    named = re.findall(r"`([a-z0-9_*]+)`", TEXT[TEXT.index("## The figures") :])
    patterns = [name.replace("*", r"\w+") for name in named]
    unnamed = {name for name in FIGURES if not any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert unnamed <= {"instances", "score_before", "tokens_before", "unparsable_before"}


def test_numbers_of_the_page_are_those_of_the_code() -> None:
    assert f"fewer than {LEAST_CLUSTERS} of these" in TEXT
    assert f"the first {MOST_FLIPS:,}" in TEXT
