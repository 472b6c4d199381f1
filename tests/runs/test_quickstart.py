"""The quickstart's commands, table and, on the real model, all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
from helm.benchmark.presentation.run_entry import read_run_entries
from helm.benchmark.presentation.schema import read_schema
from helm.benchmark.run import build_parser, run_entries_to_run_specs

from flexgen_helm.assets import install_helm_data, smollm2_folder
from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.helm.report import WORKLOAD_FILE
from flexgen_helm.runs.quickstart import __main__ as quickstart
from flexgen_helm.runs.quickstart.commands import offline_environment, run_command, suite_file, write_model_metadata
from flexgen_helm.runs.quickstart.scores import Score, Work, read_scores, read_work, render

SCHEMA = suite_file("schema.yaml")


def write_run(suite: Path, name: str, groups: list[str], stats: list[dict[str, Any]], requests: int) -> None:
    folder = suite / name
    folder.mkdir(parents=True)
    (folder / "run_spec.json").write_text(json.dumps({"name": name, "groups": groups}))
    (folder / "stats.json").write_text(json.dumps(stats))
    (folder / "scenario_state.json").write_text(json.dumps({"request_states": [{}] * requests}))


def stat(name: str, mean: float, split: str = "test", **more: Any) -> dict[str, Any]:
    return {"name": {"name": name, "split": split, **more}, "count": 1, "mean": mean}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite folder with two runs, of which one has perturbed and unsplit statistics beside the score."""
    folder = tmp_path / "output" / "runs" / "quickstart"
    perturbed = stat("exact_match", 0.1, perturbation={"name": "typos"})
    unsplit = {"name": {"name": "exact_match"}, "count": 0}
    good = [perturbed, unsplit, stat("exact_match", 0.25), stat("num_prompt_tokens", 350.4), stat("exact_match", 0, "x")]
    write_run(folder, "mmlu:subject=anatomy,method=joint,model=a_b", ["mmlu"], good, 10)
    stats = [stat("quasi_exact_match", 0.5), stat("num_prompt_tokens", 12.0)]
    groups = ["synthetic_reasoning", "synthetic_reasoning_pattern_match"]
    write_run(folder, "synthetic_reasoning:mode=pattern_match,model=a_b", groups, stats, 4)
    (folder / "groups").mkdir()
    work = {"prompt_tokens_asked": 4000, "prompt_tokens_computed": 1000, "seconds": 2.0}
    report = {"num_requests": 14, "num_cached": 4, "stats": work}
    (folder / WORKLOAD_FILE).write_text(json.dumps([report]))
    return folder


def test_scores_are_the_main_metric_of_the_main_split(suite: Path) -> None:
    assert read_scores(suite, SCHEMA) == [
        Score("mmlu:subject=anatomy,method=joint", "exact_match", 0.25, requests=10, prompt_tokens=3504),
        Score("synthetic_reasoning:mode=pattern_match", "quasi_exact_match", 0.5, requests=4, prompt_tokens=48),
    ]


def test_table_shows_scores_and_work(suite: Path) -> None:
    lines = render(read_scores(suite, SCHEMA), read_work(suite)).splitlines()
    assert lines[1].split() == ["mmlu:subject=anatomy,method=joint", "exact_match", "0.250", "10", "3504"]
    assert lines[-1] == (
        "10 requests in 2 s, 5.00 requests/s (4 more from HELM's cache). Prompt tokens: 4,000 asked, 1,000 computed "
        "(4.0 times fewer, because shared prefixes are computed once)."
    )


def test_rate_is_not_made_up_when_all_was_cached() -> None:
    assert render([], Work(3, 3, 0.0, 0, 0)).endswith("All 3 requests were answered from HELM's cache.")


def test_helm_understands_the_commands(tmp_path: Path) -> None:
    command = run_command(Path("/models/tiny"), tmp_path, 7)
    arguments = build_parser().parse_args(command[1:])
    assert (arguments.models_to_run, arguments.max_eval_instances) == (["flexgen//models/tiny"], 7)
    register_model_deployment(ModelDeployment("some/model", ClientSpec("helm.clients.simple_client.SimpleClient")))
    entries = read_run_entries(arguments.conf_paths).entries
    specs = run_entries_to_run_specs(entries, models_to_run=["some/model"])
    methods = [spec.adapter_spec.method for spec in specs]
    assert methods == ["multiple_choice_joint", "multiple_choice_separate_original", "generation"]
    shown = {group.name for group in read_schema(str(SCHEMA)).run_groups}
    assert all(set(spec.groups) <= shown for spec in specs)


def test_main_prints_each_command_and_stops_at_a_failure(
    tmp_path: Path, suite: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    status = {"helm.benchmark.run": 0, "helm.benchmark.presentation.summarize": 0}

    def run(command: list[str], env: dict[str, str], check: bool) -> subprocess.CompletedProcess[str]:
        assert env["HF_HUB_OFFLINE"] == "1"
        ran.append(command)
        return subprocess.CompletedProcess(command, status[command[2]])

    monkeypatch.setattr(quickstart, "install_helm_data", lambda folder: None)
    monkeypatch.setattr(quickstart.subprocess, "run", run)
    arguments = ["quickstart", "--model", str(tmp_path / "org" / "model"), "-o", str(tmp_path / "output")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert quickstart.main() == 0
    assert [command[:3] for command in ran] == [[sys.executable, "-m", module] for module in status]
    printed = capsys.readouterr().out
    assert printed.strip().startswith("$ helm-run --conf-paths")
    assert "helm-server --suite quickstart" in printed
    status["helm.benchmark.run"] = 3
    assert quickstart.main() == 3
    assert len(ran) == 3


def test_missing_assets_are_a_message_and_not_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> None:
        raise FlexGenError("no network")

    monkeypatch.setattr(quickstart, "install_helm_data", fail)
    monkeypatch.setattr(sys, "argv", ["quickstart", "--model", str(tmp_path)])
    assert quickstart.main() == 1
    assert capsys.readouterr().err == "no network\n"


def test_nothing_is_downloaded_for_nltk(tmp_path: Path) -> None:
    code = "from helm.benchmark.metrics.nltk_helper import install_nltk_resources as f; f(); print('done')"
    environment = offline_environment(tmp_path)
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (process.stdout, "nltk_data" in process.stderr) == ("done\n", False)


def test_summarizer_knows_the_model(tmp_path: Path) -> None:
    write_model_metadata(tmp_path / "org" / "model", tmp_path)
    code = (
        "import sys; from helm.benchmark.config_registry import register_configs_from_directory as register;"
        "from helm.benchmark.model_metadata_registry import get_model_metadata as get;"
        "register(sys.argv[1]); print(get('org/model').display_name)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "prod_env")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("model\n")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_from_end_to_end(tmp_path: Path) -> None:
    try:
        smollm2_folder()
        install_helm_data(tmp_path)
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "flexgen_helm.runs.quickstart", "-m", "2", "-o", str(tmp_path)]
    for cached in (False, True):
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert ("All 8 requests were answered from HELM's cache" in output) is cached
        assert ("8 requests in" in output) is not cached
    suite = tmp_path / "runs" / "quickstart"
    (model,) = json.loads((suite / "schema.json").read_text())["models"]
    assert model["display_name"] == "SmolLM2-135M-Instruct"
    groups = json.loads((suite / "groups" / "mmlu.json").read_text())
    assert len(groups[0]["rows"]) == 1
