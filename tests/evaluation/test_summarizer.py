"""HELM's tables of a model and its variants, and what a browser makes of them."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.presentation.schema import validate_schema_file

from flexgen_helm.evaluation.suites import find_suite
from flexgen_helm.evaluation.summarizer import FlexGenSummarizer
from tests.helm.conftest import RunSuite, _deployments, loader, run_suite
from tests.helm.fakes import FakeLoader, run_spec
from tests.reports.synthetic import NUMERICS, record_of

__all__ = ["_deployments", "loader", "run_suite"]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MODEL, VARIANT = "flexgen/test/letters", "flexgen/test/others"
SCHEMA = find_suite("accuracy_vs_compression").schema
FIDELITY = {"kl": 0.0313, "p99": 0.27, "top1_agreement": 0.9, "perplexity_ratio": 1.1}


def keep_fidelity(cache: Path, scheme: str) -> None:
    """Writes a result of the model against its variant into the cache folder."""
    weights: Any = NUMERICS["weights"]
    figures: dict[str, Any] = {
        "kl": {"mean": FIDELITY["kl"], "median": 0.01, "p99": FIDELITY["p99"], "p999": 1.0},
        "delta_p": {"mean": 0.0, "rms": 0.1},
        "top1_agreement": FIDELITY["top1_agreement"],
        "perplexity_ratio": FIDELITY["perplexity_ratio"],
    }
    content = {
        "reference": {"model": "x", "numerics": NUMERICS},
        "candidate": {"model": "x", "numerics": {**NUMERICS, "weights": {**weights, "scheme": scheme}}},
        "text": {"source": "text", "positions": 100},
        **figures,
        "ci95": {name: dict.fromkeys(value) if isinstance(value, dict) else None for name, value in figures.items()},
    }
    (cache / "fidelity").mkdir()
    (cache / "fidelity" / "one.json").write_text(json.dumps(content))


@pytest.fixture
def output(loader: FakeLoader, run_suite: RunSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HELM's output folder with two run entries of a model and of its variant, as helm-run wrote them."""
    (tmp_path / "cache-folder").mkdir()
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path / "cache-folder"))
    specs = [
        replace(run_spec("multiple_choice_joint", name=f"{group}:model={name}", deployment=deployment), groups=[group])
        for name, deployment in (("letters", MODEL), ("others", VARIANT))
        for group in ("mmlu", "arc_easy")
    ]
    folder = run_suite(specs)
    for file in folder.glob("*/flexgen.json"):
        is_variant = "others" in file.parent.name
        record = record_of(f"{VARIANT}@w4" if is_variant else MODEL, scheme="four" if is_variant else "plain")
        file.write_text(json.dumps(record))
    keep_fidelity(tmp_path / "cache-folder", "four")
    return tmp_path / "output"


def summarize(output: Path) -> dict[str, Any]:
    """Returns the tables of the suite's page by title: rows as dictionaries from column to value."""
    summarizer = FlexGenSummarizer(
        release=None,
        suites=None,
        suite="suite",
        schema_path=str(SCHEMA),
        output_path=str(output),
        verbose=False,
        num_threads=1,
        allow_unknown_models=True,
        schema_validation="off",
    )
    summarizer.run_pipeline(skip_completed=False)
    tables = json.loads((output / "runs" / "suite" / "groups" / "accuracy_vs_compression.json").read_text())
    return {table["title"]: rows(table) for table in tables}


def rows(table: dict[str, Any]) -> list[dict[str, Any]]:
    titles = [cell["value"] for cell in table["header"]]
    return [dict(zip(titles, [cell.get("value") for cell in row], strict=True)) for row in table["rows"]]


def test_the_schema_is_as_helm_wants_it() -> None:
    assert not [str(message) for message in validate_schema_file(str(SCHEMA), strict=False)]


def test_model_and_variant_stand_side_by_side(output: Path) -> None:
    tables = summarize(output)
    assert list(tables) == ["Accuracy", "Efficiency", "General information", "Bits per byte", "Compression and fidelity"]
    assert [len(rows) for rows in tables.values()] == [2] * len(tables)
    plain, variant = tables["Compression and fidelity"]
    # Tokens and seconds of `record_of`; 16 bits as released, though computed in float32.
    assert plain == {**dict.fromkeys(plain), **chosen(plain, {"Model": "test/letters", "Bits/weight": 16.0, "tokens/s": 500.0})}
    expected = {
        "Bits/weight": 4.5,
        "KL": FIDELITY["kl"],
        "KL p99": FIDELITY["p99"],
        "Same top-1": FIDELITY["top1_agreement"],
        "PPL ratio": FIDELITY["perplexity_ratio"],
        "tokens/s": 500.0,
    }
    assert variant == {**chosen(variant, expected), "Model": "test/others"}


def chosen(row: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Returns values by the column of a row whose title ends with their name."""
    return {next(title for title in row if title.endswith(name)): value for name, value in values.items()}


@pytest.fixture
def address(output: Path) -> Iterator[str]:
    """Address of helm-server on the output folder."""
    summarize(output)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "helm.benchmark.server", "--suite", "suite", "--port", str(port)]
    with subprocess.Popen(
        [*command, "--output-path", str(output)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as server:
        try:
            for _ in range(300):
                with socket.socket() as one:
                    if not one.connect_ex(("127.0.0.1", port)):
                        break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium to open helm-server's pages in")
def test_a_browser_shows_the_tables(address: str, tmp_path: Path) -> None:
    page = browse(f"{address}/#/groups/accuracy_vs_compression", tmp_path)
    for text in ("Accuracy against compression", "Compression and fidelity", "MMLU anatomy - EM", "ARC-Easy - EM"):
        assert text in page
    page = browse(f"{address}/#/groups/compression", tmp_path)
    cells = re.findall("<td[^>]*>(.*?)</td>", page, flags=re.DOTALL)
    texts = [re.sub("<[^>]*>", "", cell).strip() for cell in cells]
    # HELM's page sorts the rows and rounds to three digits; what is not there is a dash.
    assert sorted([texts[:7], texts[7:]]) == [
        ["test/letters", "16", "-", "-", "-", "-", "500"],
        ["test/others", "4.5", "0.031", "0.27", "0.9", "1.1", "500"],
    ]


def browse(url: str, folder: Path) -> str:
    """Returns the document that a browser has made of a page."""
    quiet = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command = [str(BROWSER), *quiet, "--virtual-time-budget=10000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
