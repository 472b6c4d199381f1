"""`flexgen-helm eval`: what it runs, what it prints, and how it ends."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helm.benchmark.run import build_parser

from flexgen_helm.cli import main
from flexgen_helm.errors import FlexGenError, OutOfSpace
from flexgen_helm.evaluation import evaluate, preparation
from flexgen_helm.evaluation.commands import Evaluation, environment, run_command
from flexgen_helm.evaluation.preparation import place_data, write_model_metadata
from flexgen_helm.evaluation.suites import find_suite

SUITE = 'entries: [{description: "dyck_language:num_parenthesis_pairs=2,model=text", priority: 1}]'
UNKNOWN = '{description: "custom_mcqa:path=/no/such/file.jsonl,model=text", priority: 1}'
DYCK = "dyck_language_np=2"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A folder with one run entry that needs no data."""
    folder = tmp_path / "brackets"
    folder.mkdir()
    (folder / "run_entries.conf").write_text(SUITE)
    return folder


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would run, instead of running it; each command ends as `false` does."""
    ran: list[list[str]] = []

    def start(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        ran.append(command)
        return real(["false"])

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    return ran


def run(*arguments: object) -> int:
    return main(["eval", *map(str, arguments)])


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the one line of an error."""
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("flexgen-helm: ")]
    return line


def test_suite_by_path_from_end_to_end(
    tiny_model: Path, suite: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (suite / "run_entries.conf").write_text(SUITE.replace("]", f", {UNKNOWN}]"))
    output = tmp_path / "output"
    assert run("--model", tiny_model, "--suite", suite, "-m", 3, "--out", output) == 1
    printed, complaint = capfd.readouterr()
    first, second, *_ = [line for line in printed.splitlines() if line]
    assert first == f"{suite}/run_entries.conf: 2 run entries, at most 3 instances of each"
    assert second.startswith(f"$ helm-run --conf-paths {suite}/run_entries.conf --models-to-run flexgen/{tiny_model} ")
    assert "$ helm-summarize --suite brackets " in printed
    table = printed[printed.index("run entry ") :].splitlines()
    stats = json.loads(next(output.glob("runs/brackets/dyck*/stats.json")).read_text())
    (score,) = [s["mean"] for s in stats if s["name"] == {"name": "exact_match_indicator", "split": "test"}]
    assert table[1].split()[:5] == [DYCK, "exact_match_indicator", f"{score:.3f}", "3", "3"]
    tokens = int(table[1].split()[5].replace(",", ""))
    assert table[3].startswith("3 requests in ")
    assert f"Prompt tokens: {tokens:,} asked" in table[3]
    assert f"{output}/runs/brackets" in printed
    assert f"helm-server --suite brackets --output-path {output}" in printed
    assert table[4].startswith("Most time went into ")
    (log,) = (output / "logs").iterdir()
    *steps, status, cause = complaint.splitlines()
    assert "helm-run ended with status 1, 1 runs are complete. Run the same command again to continue" in status
    assert status.endswith(f"HELM's log is {log}.")
    assert re.fullmatch(r"  RunnerError: Failed runs: .* FileNotFoundError: .*'/no/such/file.jsonl'", cause)
    assert steps == [
        f"flexgen/{tiny_model}: 3 requests (3 of at most 5 new tokens)",
        f"Loading {tiny_model}",
        "the default policy stays: weights, K and V of the jobs all fit on the device",
        "3 of 3 requests are computed",
    ]
    assert "Runner.run_one" in log.read_text() or "run_specs {" in log.read_text()
    assert "run_specs {" not in printed + complaint
    (model,) = json.loads((output / "runs" / "brackets" / "schema.json").read_text())["models"]
    assert model["display_name"] == tiny_model.name


@pytest.mark.slow
def test_entries_for_another_model_are_said_to_run_nothing(
    tiny_model: Path, suite: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (suite / "run_entries.conf").write_text(SUITE.replace("model=text", "model=openai/gpt2"))
    assert run("--model", tiny_model, "--suite", suite, "--out", tmp_path / "output") == 1
    assert "nothing was run: no run entry of" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart_from_end_to_end_and_again(tiny_model: Path, helm_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for again in (False, True):
        assert run("--model", tiny_model, "--suite", "quickstart", "-m", 2, "--out", helm_data) == 0
        printed, complaint = capfd.readouterr()
        table = printed[printed.index("run entry ") :].splitlines()
        assert [line.split()[1] for line in table[1:7]] == [
            *("exact_match", "exact_match", "last_word_accuracy", "exact_match", "bits_per_byte", "quasi_exact_match")
        ]
        assert ("were answered before." in table[8]) is again
        assert "flexgen-helm:" not in complaint
    groups = json.loads((helm_data / "runs" / "quickstart" / "groups" / "quickstart.json").read_text())
    assert {"Accuracy", "Bits per byte", "Efficiency"} <= {group["title"] for group in groups}
    assert all(len(group["rows"]) == 1 for group in groups)


def test_commands_run_by_this_interpreter_and_end_with_helms_status(
    tiny_model: Path, suite: Path, tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", tiny_model, "--suite", suite, "--out", tmp_path / "output") == 1
    (command,) = commands
    assert command[:3] == [sys.executable, "-m", "helm.benchmark.run"]
    arguments = build_parser().parse_args(command[3:])
    assert arguments.models_to_run == [f"flexgen/{tiny_model}"]
    assert (arguments.suite, arguments.max_eval_instances, arguments.plugins) == ("brackets", 100, None)
    printed = capsys.readouterr()
    shown = next(line for line in printed.out.splitlines() if line.startswith("$ "))
    assert shlex.split(shown)[2:] == command[3:]
    assert "helm-run ended with status 1, 0 runs are complete." in printed.err


def test_results_of_earlier_commands_are_not_shown(
    tiny_model: Path, suite: Path, tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "output" / "runs" / "brackets" / "old:model=m"
    old.mkdir(parents=True)
    for file in ("stats.json", "per_instance_stats.json"):
        (old / file).write_text("[]")
        os.utime(old / file, (time.time() - 60,) * 2)
    adapter = {"model_deployment": f"flexgen/{tiny_model}"}
    (old / "run_spec.json").write_text(json.dumps({"adapter_spec": adapter, "groups": [], "scenario_spec": {}}))
    run("--model", tiny_model, "--suite", suite, "--out", tmp_path / "output")
    assert "run entry" not in capsys.readouterr().out


def test_an_interrupt_reaches_helm_first(
    tiny_model: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """HELM keeps what is finished when it is interrupted, so it is not killed while it does."""
    waits: list[str] = []

    class Interrupted:
        def __enter__(self) -> Interrupted:
            return self

        def __exit__(self, *error: object) -> None:
            waits.append("left")

        def wait(self) -> int:
            waits.append("waited")
            if len(waits) == 1:
                raise KeyboardInterrupt
            return 130

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: Interrupted())
    assert run("--model", tiny_model, "--suite", suite, "--out", tmp_path / "output") == 130
    assert waits == ["waited", "waited", "left"]
    kept = "Finished answers are kept; run the same command again to continue."
    assert errors(capsys) == f"flexgen-helm: interrupted. {kept}"


def test_nothing_but_helm_run_loads_torch(tiny_model: Path, suite: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flexgen_helm.evaluation.evaluate import make_evaluation, prepare;"
        "prepare(make_evaluation(*sys.argv[1:3], Path(sys.argv[3]), 1)); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_model), str(suite), str(tmp_path / "output")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("False\n")


@pytest.mark.parametrize("number", ["0", "-3", "many", "1.5"])
def test_the_number_of_instances_is_a_number(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("--model", "m", "--suite", "quickstart", f"-m={number}")
    assert "is not a number; give 1 or more" in capsys.readouterr().err


def test_unknown_suite(tiny_model: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", tiny_model, "--suite", "quick") == 2
    assert re.search(r"no suite `quick`.* mmlu, .*quickstart", errors(capsys))
    assert not commands


@pytest.mark.parametrize("model", ["/no/such/folder", "flexgen//no/such/folder", "flexgen/a/b/c/d"])
def test_missing_model(model: str, suite: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", model, "--suite", suite) == 2
    assert re.search(
        r"(No model was found at `/no/such/folder`|not the name of a flexgen deployment).*flexgen/", errors(capsys)
    )
    assert not commands


@pytest.mark.parametrize("model", ["path/to/my/model", "./models/missing/x", "./x", "../x", "~nouser/x"])
def test_a_mistyped_path(model: str, suite: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", model, "--suite", suite) == 2
    assert f"no model `{model}`: it is neither an existing folder nor the name `<organization>/<model>`" in errors(capsys)
    assert not commands


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, OutOfSpace), (errno.EACCES, FlexGenError)])
def test_only_a_full_disk_is_out_of_space(
    number: int, kind: type[FlexGenError], suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(evaluation: Evaluation) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(preparation, "place_data", fail)
    with pytest.raises(FlexGenError, match=os.strerror(number)) as caught:
        preparation.prepare(Evaluation("flexgen/a/b", find_suite(str(suite)), tmp_path, 1))
    assert caught.type is kind


def test_output_that_cannot_be_written(
    tiny_model: Path, suite: Path, tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run("--model", tiny_model, "--suite", suite, "--out", tmp_path / "file") == 2
    assert re.search(r"file cannot be written \(.+\)\. Name a folder that can, with room, by --out\.", errors(capsys))
    assert not commands


def test_missing_helm(suite: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run("--model", "m", "--suite", suite) == 2
    assert errors(capsys) == 'flexgen-helm: HELM is not installed. Install it with `pip install "flexgen_helm[helm]"`.'


def test_missing_data(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> None:
        raise FlexGenError("no network")

    monkeypatch.setattr(preparation, "install_helm_data", fail)
    assert run("--model", tiny_model, "--suite", "quickstart", "--out", tmp_path) == 2
    assert errors(capsys) == "flexgen-helm: no network"


def test_nothing_is_downloaded_for_nltk(tmp_path: Path) -> None:
    evaluation = Evaluation("flexgen//a/b", find_suite("quickstart"), tmp_path, 1)
    code = "from helm.benchmark.metrics.nltk_helper import install_nltk_resources as f; f(); print('done')"
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment(evaluation), capture_output=True, text=True, check=True
    )
    assert (process.stdout, "nltk_data" in process.stderr) == ("done\n", False)


def test_the_hub_is_asked_for_what_is_not_here(suite: Path, tmp_path: Path) -> None:
    quickstart, mine = find_suite("quickstart"), find_suite(str(suite))
    assert environment(Evaluation("flexgen//a/b", quickstart, tmp_path, 1))["HF_HUB_OFFLINE"] == "1"
    for evaluation in (Evaluation("flexgen/a/b", quickstart, tmp_path, 1), Evaluation("flexgen//a/b", mine, tmp_path, 1)):
        assert environment(evaluation).get("HF_HUB_OFFLINE") == os.environ.get("HF_HUB_OFFLINE")


def test_summarizer_knows_every_model(suite: Path, tmp_path: Path) -> None:
    for model in ("/some/org/first", "org/second", "org/second"):
        write_model_metadata(Evaluation(f"flexgen/{model}", find_suite(str(suite)), tmp_path, 1))
    code = (
        "import sys; from helm.benchmark.config_registry import register_configs_from_directory as register;"
        "from helm.benchmark.model_metadata_registry import get_model_metadata as get;"
        "register(sys.argv[1]); print(*(get(f'org/{name}').display_name for name in ('first', 'second')))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "prod_env")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("first second\n")
    assert (tmp_path / "prod_env" / "model_metadata.yaml").read_text().count("name: org/second") == 1


@pytest.mark.parametrize("content", ["models: [", "models:", "models: [{display_name: a}]", "models: [a]"])
def test_a_torn_description_of_models_is_an_error(content: str, suite: Path, tmp_path: Path) -> None:
    (tmp_path / "prod_env").mkdir()
    (tmp_path / "prod_env" / "model_metadata.yaml").write_text(content)
    with pytest.raises(FlexGenError, match="Repair or remove it"):
        write_model_metadata(Evaluation("flexgen/a/b", find_suite(str(suite)), tmp_path, 1))


def test_own_data_is_placed_and_said_and_does_not_overwrite(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (suite / "scenarios" / "mine" / "data").mkdir(parents=True, exist_ok=True)
        (suite / "scenarios" / "mine" / "data" / name).write_text("ours")
    data = tmp_path / "output" / "scenarios" / "mine" / "data"
    data.mkdir(parents=True)
    (data / "b").write_text("theirs")
    place_data(Evaluation("flexgen/a/b", find_suite(str(suite)), tmp_path / "output", 1))
    assert [(data / name).read_text() for name in ("a", "b")] == ["ours", "theirs"]
    assert capsys.readouterr().out == f"Data of the suite: {data}/a\n"


def test_a_copy_that_was_interrupted_is_not_taken_for_data(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (suite / "scenarios").mkdir()
    (suite / "scenarios" / "a").write_text("whole")
    evaluation, target = Evaluation("flexgen/a/b", find_suite(str(suite)), tmp_path, 1), tmp_path / "scenarios" / "a"

    def tear(source: Path, copy: Path) -> None:
        copy.write_text("wh")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", tear)
        with pytest.raises(KeyboardInterrupt):
            place_data(evaluation)
    assert not target.exists()
    place_data(evaluation)
    assert target.read_text() == "whole"


def test_relative_models_become_absolute(
    tiny_model: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model)
    for name in (".", f"../{tiny_model.name}/", str(tiny_model), f"flexgen/{tiny_model}"):
        evaluation = evaluate.make_evaluation(name, str(suite), tmp_path, 1)
        assert f"flexgen/{tiny_model}" in run_command(evaluation)


def test_options_of_the_model_are_a_deployment_of_their_own(
    tiny_model: Path,
    suite: Path,
    tmp_path: Path,
    commands: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is written is what the docs show: HELM reads it, and the engine gets these keywords."""
    output = tmp_path / "output"
    placement = ["--policy", "weights=0:0.5:0.5,prefetch=2", "--max-memory", "host=2GiB", "--offload-folder", "~/slabs"]
    number = ["--dtype", "bfloat16", "--kv-dtype", "float32", "--device", "cpu", "--rows", "packed", "--compile-layers"]
    for options in (placement, number, [*number, *placement]):
        run("--model", tiny_model, "--suite", suite, "--out", output, *options)
    placed, half, again = [build_parser().parse_args(command[3:]).models_to_run[0] for command in commands]
    assert placed == f"flexgen/{tiny_model}"  # placement changes no answer
    assert half == again == f"{placed}+bfloat16+cpu+packed+kv-float32+compiled"
    file = output / "prod_env" / "model_deployments.yaml"
    assert f"Deployment {half} in {file}: dtype: bfloat16, device: cpu" in capsys.readouterr().out
    code = (
        "import sys; from helm.benchmark.config_registry import register_configs_from_directory as register;"
        "register(sys.argv[1]); import flexgen_helm.plugin, json;"
        "from helm.benchmark.model_deployment_registry import get_model_deployment as get;"
        "made = [get(name) for name in sys.argv[2:]];"
        "print(json.dumps([[one.model_name, one.tokenizer_name, one.client_spec.args] for one in made]))"
    )
    command = [sys.executable, "-c", code, str(output / "prod_env"), half, placed]
    monkeypatch.undo()
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    preparation.write_deployment(evaluate.make_evaluation(str(tiny_model), str(suite), output, 1))
    assert [entry["name"] for entry in yaml.safe_load(file.read_text())["model_deployments"]] == [half]
    numbers = {"dtype": "bfloat16", "kv_dtype": "float32", "device": "cpu", "rows": "packed", "compile_layers": True}
    rest = {
        "policy": {"weights": [0, 0.5, 0.5], "prefetch": 2},
        "max_memory": {"host": "2GiB"},
        "offload_folder": str(Path.home() / "slabs"),
    }
    for deployment, (model, tokenizer, arguments) in zip(
        (half, placed), json.loads(process.stdout.splitlines()[-1]), strict=True
    ):
        # HELM looks for a model of the last two parts of the name.
        assert model == "/".join(deployment.split("/")[-2:])
        assert tokenizer == f"flexgen/{tiny_model}"
        assert arguments == {"name_or_path": str(tiny_model)} | rest | (numbers if deployment == half else {})
