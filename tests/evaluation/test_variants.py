"""`flexgen-helm eval --model MODEL@w4`: the deployment that it stands for, and how HELM shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flexgen_helm.cli import main
from flexgen_helm.errors import CompressionError
from flexgen_helm.evaluation.commands import Evaluation, run_command
from flexgen_helm.evaluation.evaluate import make_evaluation
from flexgen_helm.evaluation.preparation import write_deployment, write_model_metadata


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "brackets"
    folder.mkdir()
    (folder / "run_entries.conf").write_text('entries: [{description: "dyck_language:num_parenthesis_pairs=2,model=text"}]')
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def make(model: object, suite: Path, output: Path, **options: Any) -> Evaluation:
    return make_evaluation(str(model), str(suite), output, 1, options)


def metadata(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    write_model_metadata(evaluation)
    text = (evaluation.local_path / "model_metadata.yaml").read_text()
    return {entry["name"]: entry for entry in yaml.safe_load(text)["models"]}


def test_a_variant_is_named_in_every_way_and_in_one(
    model: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (f"{model}@w3-entropy", "org/model@w3.5-entropy", "./org/model@w3-entropy", f"flexgen/{model}@w3.50-entropy"):
        evaluation = make(name, suite, tmp_path / "output")
        assert evaluation.deployment == f"flexgen/{model}@w3-entropy"
        assert evaluation.arguments == {"name_or_path": str(model), "compression": "w3-entropy"}
        assert evaluation.deployment in run_command(evaluation)


def test_a_name_that_says_all_needs_no_deployment(model: Path, suite: Path, tmp_path: Path) -> None:
    evaluation = make(f"{model}@w4", suite, tmp_path / "output")
    write_deployment(evaluation)
    assert not (evaluation.local_path / "model_deployments.yaml").exists()


def test_other_options_stand_before_the_variant(model: Path, suite: Path, tmp_path: Path) -> None:
    """So that what is before the last `@` is the deployment to compare with."""
    plain = make(model, suite, tmp_path / "output", dtype="bfloat16")
    evaluation = make(f"{model}@w4", suite, tmp_path / "output", dtype="bfloat16")
    assert evaluation.deployment == f"{plain.deployment}@w4" == f"flexgen/{model}+bfloat16@w4"
    write_deployment(evaluation)
    (written,) = yaml.safe_load((evaluation.local_path / "model_deployments.yaml").read_text())["model_deployments"]
    assert (written["name"], written["model_name"]) == (evaluation.deployment, "org/model+bfloat16@w4")
    assert written["client_spec"]["args"] == {"name_or_path": str(model), "compression": "w4", "dtype": "bfloat16"}


def test_tables_show_the_variant_in_words(model: Path, suite: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    for name, options in ((f"{model}", {}), (f"{model}@w4", {}), (f"{model}@w3.25-entropy", {"dtype": "bfloat16"})):
        models = metadata(make(name, suite, output, **options))
    assert {name: entry["display_name"] for name, entry in models.items()} == {
        "org/model": "model",
        "org/model@w4": "model (4-bit weights)",
        "org/model+bfloat16@w3.25-entropy": "model+bfloat16 (3.25-bit weights)",
    }
    assert models["org/model@w4"]["description"] == f"{model} (4-bit weights), served by flexgen_helm."


def test_a_folder_with_an_at_sign_is_that_folder(model: Path, suite: Path, tmp_path: Path) -> None:
    renamed = model.rename(model.with_name("model@v1"))
    for name in (str(renamed), f"flexgen/{renamed}"):
        evaluation = make(name, suite, tmp_path / "output", dtype="bfloat16")
        assert evaluation.deployment == f"flexgen/{renamed}+bfloat16"
        assert metadata(evaluation)["org/model@v1+bfloat16"]["display_name"] == "model@v1+bfloat16"


def test_what_there_is_not_is_one_line(model: Path, suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", f"{model}@w5", "--suite", str(suite)]) == 2
    assert "flexgen-helm: There is no variant `@w5` of a model. There are `w2`" in capsys.readouterr().err
    with pytest.raises(CompressionError, match="There is no variant `@kv5`"):
        make(f"{model}@kv5", suite, suite)
