"""The command `flexgen-helm fidelity`: what it prints, keeps and refuses, and how it loads both models."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib, which comes with the extra `helm`")

from matplotlib.image import imread

from flexgen_helm import Engine, cli
from flexgen_helm.cli import main
from tests.models import save_tiny
from tests.tokenizers import save_character_tokenizer

TEXT = "The capital of France is Paris, and that of Italy is Rome. "
FIGURES = {"perplexity", "perplexity_ratio", "bits_per_byte", "kl", "top1_agreement", "delta_p"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("fidelity")
    save_character_tokenizer(save_tiny("llama", folder))
    (folder / "text.txt").write_text(TEXT * 8)
    (folder / "jobs.jsonl").write_text(json.dumps({"prompt": TEXT}) + "\n" + json.dumps({"token_ids": [5, 6, 7, 8]}) + "\n")
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    return ["fidelity", "--model", str(folder / "llama"), "--device", "cpu", "--out", str(folder / "out"), *more]


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_has_every_figure_with_its_interval_and_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--candidate-dtype", "bfloat16", "--text", str(folder / "text.txt"), "--window", "40"]
    assert main(arguments(folder, *options, "--json")) == 0
    found = result(capsys)
    assert set(found) >= FIGURES
    assert set(found["ci95"]) == FIGURES
    assert set(found["kl"]) == set(found["ci95"]["kl"]) == {"mean", "median", "p99", "p999"}
    assert set(found["perplexity"]) == set(found["bits_per_byte"]) == {"reference", "candidate"}
    low, high = found["ci95"]["kl"]["mean"]
    assert 0 < low < found["kl"]["mean"] < high
    assert found["text"]["positions"] == len(TEXT) * 8 - 1
    assert [found[side]["numerics"]["weights"]["dtype"] for side in ("reference", "candidate")] == ["float32", "bfloat16"]
    floors = found["noise_floor"]
    assert floors["self"]["kl"] == {"mean": 0, "median": 0, "p99": 0, "p999": 0}
    assert (floors["self"]["top1_agreement"], floors["self"]["delta_p"]) == (1, {"mean": 0, "rms": 0})
    assert floors["dtype"]["kl"] == pytest.approx(found["kl"])  # which is what was compared
    files = found.pop("files")
    assert json.loads(Path(files["json"]).read_text()) == found
    picture = imread(files["png"])
    assert picture.shape[0] > 300
    assert picture.std() > 0.05


def test_the_table_has_the_figures_of_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--candidate-dtype", "bfloat16", "--text", str(folder / "text.txt"), "--window", "40", "--no-plot"]
    assert main(arguments(folder, *options, "--per-layer", "--noise-tokens", "64")) == 0
    printed, said = capsys.readouterr()
    (file,) = re.findall("^result: (.*)$", printed, flags=re.MULTILINE)
    found = json.loads(Path(file).read_text())
    assert len(found["per_layer"]["layers"]) == 2
    assert found["noise_floor"]["self"]["positions"] <= 64
    (line,) = (line for line in printed.splitlines() if line.startswith("KL divergence (nats), mean"))
    assert line.split()[4] == f"{found['kl']['mean']:.4g}"
    assert "the reference against itself: mean KL 0, most likely token equal 1" in printed
    assert "layer 0: output " in printed
    assert "plot:" not in printed
    assert "471 of 471 predictions compared" in said


def test_another_model_as_candidate_and_jobs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same model again: no figure differs, and what two dtypes do is measured apart."""
    copy = shutil.copytree(folder / "llama", folder / "copy", dirs_exist_ok=True)
    options = ["--candidate", str(copy), "--jobs", str(folder / "jobs.jsonl"), "--json", "--window", "16"]
    offload = ["--policy", "weights=0:0:1", "--offload-folder", str(folder / "slabs")]
    assert main(arguments(folder, *options, *offload)) == 0
    found = result(capsys)
    assert found["candidate"]["model"] == str(copy)
    assert found["bootstrap"]["over"] == "jobs"
    assert (found["kl"]["mean"], found["top1_agreement"], found["perplexity_ratio"]) == (0, 1, 1)
    assert found["noise_floor"]["dtype"]["kl"]["mean"] > 0
    assert {path.name for path in (folder / "slabs").iterdir()} == {"reference", "candidate", "reference-in-another-dtype"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--text", "text.txt"], "no candidate"),
        (["--candidate-dtype", "bfloat16", "--text", "missing.txt"], "no file .*missing.txt"),
        (["--candidate-dtype", "bfloat16", "--text", "text.txt", "--jobs", "jobs.jsonl"], "both given"),
        (["--candidate-dtype", "bfloat16", "--text", "text.txt", "--window", "100000"], "2 to "),
        (["--candidate-dtype", "bfloat16", "--text", "short.txt"], "less than a window"),
        (["--candidate-dtype", "bfloat16", "--text", "empty.txt"], "is empty"),
        (["--candidate-dtype", "bfloat16", "--text", "text.txt", "--noise-tokens", "-1"], "0 or more"),
        (["--candidate-dtype", "bfloat16", "--text", "text.txt", "--max-memory", "ram=1GiB"], "max_memory"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    folder: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "short.txt").write_text("abc")
    (folder / "empty.txt").write_text("\n")
    options = [str(folder / option) if option.endswith((".txt", ".jsonl")) else option for option in options]
    assert main(arguments(folder, *options)) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("flexgen-helm: ")
    assert re.search(reason, complaint), complaint


def test_each_side_is_loaded_with_its_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[argparse.Namespace] = []

    def load(args: argparse.Namespace) -> Engine:
        seen.append(args)
        return cli._load_engine(args)

    options = ["--candidate-dtype", "float16", "--kv-dtype", "float32", "--max-memory", "host=2GiB", "--max-tokens", "100"]
    command = arguments(folder, *options, "--text", str(folder / "text.txt"), "--window", "50", "--no-plot", "--json")
    assert main(command, load_engine=load) == 0
    assert [args.dtype for args in seen] == ["auto", "float16", "bfloat16"]
    assert {args.max_memory["host"] for args in seen} == {2**30}
    assert {args.kv_dtype for args in seen} == {"float32"}
    assert result(capsys)["text"]["positions"] == 99
