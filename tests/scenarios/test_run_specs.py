"""Run entries as HELM parses them, and what helm-summarize knows of their scenarios and metrics."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helm.benchmark.metrics.metric import create_metric
from helm.benchmark.scenarios.scenario import create_scenario

from flexgen_helm.errors import ScenarioError
from tests.scenarios.suites import parse

ENTRIES = {
    "lambada": ("lambada:task=accuracy", "lambada", "last_word_accuracy"),
    "lambada:task=perplexity": ("lambada:task=perplexity", "lambada_perplexity", "last_word_perplexity"),
    "lambada:config=de,task=accuracy": ("lambada:task=accuracy,config=de", "lambada", "last_word_accuracy"),
    "perplexity:path=sotu_2026.txt": ("perplexity:path=sotu_2026.txt", "perplexity", "bits_per_byte"),
    "perplexity:path=a/b=c,split=test[:10],field=body": (
        "perplexity:path=a_b=c,split=test[:10],field=body",
        "perplexity",
        "bits_per_byte",
    ),
}
OWN_METRICS = {"last_word_accuracy", "last_word_perplexity", "last_word_logprob"}


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_has_name_group_and_main_metric(entry: str, writing_model: Path) -> None:
    name, group, metric = ENTRIES[entry]
    spec = parse(entry, f"flexgen/{writing_model}")
    assert spec.name.removesuffix(f",model={'_'.join(writing_model.parts[-2:])}") == name
    metadata = create_scenario(spec.scenario_spec).get_metadata()
    assert spec.groups == [metadata.name] == [group]
    assert (metadata.main_metric, metadata.main_split) == (metric, "test")


def test_pieces_have_a_name_and_a_group_of_their_own(writing_model: Path) -> None:
    spec = parse("perplexity:path=a.txt,piece_bytes=2000", f"flexgen/{writing_model}")
    assert spec.name.startswith("perplexity:path=a.txt,piece_bytes=2000,model=")
    assert spec.groups == ["perplexity", "perplexity_2000_bytes"]
    assert spec.scenario_spec.args == {"path": "a.txt", "piece_bytes": 2000}


def test_answers_of_arc_stand_behind_the_question(writing_model: Path) -> None:
    """As lm-eval's arc_easy has it: ``Question: {question}\\nAnswer: {choice}``."""
    spec = parse("arc_easy", f"flexgen/{writing_model}").adapter_spec
    assert (spec.input_prefix, spec.input_suffix, spec.output_prefix) == ("Question: ", "", "\nAnswer: ")
    assert (spec.method, spec.max_train_instances) == ("multiple_choice_separate_original", 0)


def test_entries_of_the_docs_parse(writing_model: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "scenarios.md").read_text()
    entries = re.findall(r"`(lambada(?::[^`]+)?|perplexity:[^`]+)`", text)
    assert len(set(entries)) >= 7
    for entry in entries:
        create_scenario(parse(re.sub("[:,]model=.*", "", entry), f"flexgen/{writing_model}").scenario_spec)


@pytest.mark.parametrize("entry", ["lambada", "lambada:task=perplexity"])
def test_metrics_describe_themselves(entry: str, writing_model: Path) -> None:
    spec = parse(entry, f"flexgen/{writing_model}")
    metadata = [item for metric in spec.metric_specs for item in create_metric(metric).get_metadata()]
    described = {item.name for item in metadata if item.display_name and item.description}
    assert ENTRIES[entry][2] in described
    better = {item.name: item.lower_is_better for item in metadata if item.name in OWN_METRICS}
    assert all(lower == (name == "last_word_perplexity") for name, lower in better.items())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("lambada:task=words", "`lambada:task=words` is unknown. Write task=accuracy or task=perplexity"),
        ("perplexity:path=2026", r"`path=2026` as a number.*\./2026"),
        ("perplexity:path=a.txt,piece_bytes=0", "`piece_bytes=0` is no number of bytes"),
        ("perplexity:path=a.txt,piece_bytes=2k", "`piece_bytes=2k` is no number of bytes"),
        ("lambada:path=1e3", r"`path=1000\.0` as a number"),
    ],
)
def test_wrong_arguments_are_named(entry: str, message: str, writing_model: Path) -> None:
    with pytest.raises(ScenarioError, match=message):
        parse(entry, f"flexgen/{writing_model}")
