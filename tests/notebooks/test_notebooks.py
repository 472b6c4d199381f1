"""The notebooks: short, without outputs, and executed with a tiny model in place of the real one."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from flexgen_helm.assets.helm_data import speech_file
from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.runs.accuracy_vs_compression.steps import Study, run
from tests.runs.test_accuracy_vs_compression import study

__all__ = ["study"]
nbformat = pytest.importorskip("nbformat", reason="needs nbclient, which comes with the extra `dev`")
FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(name: str) -> Any:
    return nbformat.read(FOLDER / name, as_version=4)


def parameters(notebook: Any) -> Any:
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    return cell


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_is_short_and_without_outputs(file: Path) -> None:
    notebook = read(file.name)
    nbformat.validate(notebook)
    assert file.stat().st_size < 10_000
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
            # Logic stays in the package.
            assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def execute(name: str, values: Mapping[str, Any], folder: Path) -> list[str]:
    """Runs a notebook in a folder, with other values in its cell of parameters.

    Returns:
        What each of its cells of code shows, as plain text.
    """
    from nbclient import NotebookClient

    notebook = read(name)
    cell = parameters(notebook)
    names = {node.id for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)}
    assert set(values) <= names
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in values.items())
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return [shown(cell) for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any) -> str:
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


@pytest.mark.slow
def test_first_evaluation(study: Study, tmp_path: Path) -> None:
    values = {"MODEL": study.model, "SUITE": study.suite, "INSTANCES": 3, "OUT": "out"}
    _, scores, answer = execute("first_evaluation.ipynb", values, tmp_path)
    assert f"Loading {study.model}" in scores
    assert "%|" in scores  # a bar, though there is no terminal
    assert "Warning" not in scores
    assert "last_word_accuracy" in scores
    assert "bits_per_byte" in scores
    assert "\n---\nsay\n---\n" in answer


@pytest.mark.slow
def test_accuracy_against_compression_and_the_steps_that_are_left_out(
    study: Study, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        speech_file()
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))
    values = {
        "MODEL": study.model,
        "VARIANTS": list(study.variants),
        "SUITE": study.suite,
        "INSTANCES": study.instances,
        "FIDELITY_TOKENS": study.fidelity_tokens,
        "OUT": str(study.out),
    }
    _, printed, figures, reasons, _ = execute("accuracy_against_compression.ipynb", values, tmp_path)
    assert "answers that flipped" in printed
    assert "w3-minmax" in figures
    assert "minimum_detectable" in reasons  # of one passage
    tables = json.loads((study.out / "runs" / "little" / "groups" / "accuracy_vs_compression.json").read_text())
    plain, variant = ([cell.get("value") for cell in row[1:]] for row in tables[-1]["rows"])
    assert plain == [32.0, None, None, None, None, plain[-1]]  # the tiny model is released in float32
    assert variant[0] == pytest.approx(3.5, rel=0.05)  # rows of its small matrices are filled up
    assert None not in variant

    records = {file: file.read_text() for file in study.out.rglob("flexgen.json")}
    assert len(records) == 4
    shutil.rmtree(next(file.parent for file in records if "perplexity" in str(file) and "w3" in str(file)))
    assert run(study) == 0
    said = capfd.readouterr().out
    assert said.count("done before") == 2
    assert "[2/5] evaluate w3-minmax: " in said
    kept = {file: text for file, text in records.items() if "w3" not in str(file)}
    assert {file: file.read_text() for file in kept} == kept


@pytest.mark.slow
def test_choosing_a_policy(tmp_path: Path) -> None:
    values = {"MODEL": "facebook/opt-6.7b", "VARIANTS": ["", "kv4"], "NUM_JOBS": 64, "OUT": str(tmp_path / "plan")}
    _, _, table, words, pictures = execute("choosing_a_policy.ipynb", values, tmp_path)
    for name in ("16 bits", "kv4", "tokens/s", "binds", "device, GiB"):
        assert name in table
    assert words.startswith("facebook/opt-6.7b, ")
    assert "predicted peaks" in words
    assert pictures.count("Image") == 2
