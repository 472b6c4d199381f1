"""The run entries through helm-run and helm-summarize, with the data where the assets are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MAIN_METRICS = {
    "lambada": "last_word_accuracy",
    "lambada_perplexity": "last_word_perplexity",
    "perplexity": "bits_per_byte",
}


def helm(module: str, folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", f"helm.benchmark.{module}", "--suite", "suite", "--output-path", "output", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_scores_stand_in_the_tables(writing_model: Path, tmp_path: Path) -> None:
    scenarios = tmp_path / "output" / "scenarios"
    for name, content in {
        "lambada/lambada_openai_test.jsonl": "".join(json.dumps({"text": f"say {word}"}) + "\n" for word in ("one", "two")),
        "perplexity/sotu_2026.txt": "Thank you all. " * 50,
    }.items():
        (scenarios / name).parent.mkdir(parents=True)
        (scenarios / name).write_text(content)
    entries = ["lambada:model=text", "lambada:task=perplexity,model=text", "perplexity:path=sotu_2026.txt,model=text"]
    runner = ["--runner-class-name", "flexgen_helm.helm.runner.FlexGenRunner"]
    models = ["--models-to-run", f"flexgen/{writing_model}"]
    helm("run", tmp_path, "--run-entries", *entries, *models, "--max-eval-instances", "5", "--disable-cache", *runner)
    helm("presentation.summarize", tmp_path, "--auto-generate-schema")

    suite = tmp_path / "output" / "runs" / "suite"
    groups = json.loads((suite / "schema.json").read_text())["run_groups"]
    shown = {group["name"]: group["environment"] for group in groups if group["environment"]}
    assert shown == {name: {"main_name": metric, "main_split": "test"} for name, metric in MAIN_METRICS.items()}
    for group, metric in MAIN_METRICS.items():
        assert score(suite, group) == pytest.approx(mean(suite, group, metric), rel=1e-6)


def score(suite: Path, group: str) -> float:
    """Returns the number beside the model in the group's first table."""
    tables = json.loads((suite / "groups" / f"{group}.json").read_text())
    return float(tables[0]["rows"][0][1]["value"])


def mean(suite: Path, group: str, metric: str) -> float:
    for path in suite.glob("*/stats.json"):
        if json.loads((path.parent / "run_spec.json").read_text())["groups"] == [group]:
            stats = json.loads(path.read_text())
            return float(next(stat["mean"] for stat in stats if stat["name"] == {"name": metric, "split": "test"}))
    raise AssertionError(group)
