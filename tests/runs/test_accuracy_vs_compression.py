"""The suite that compares variants: entries, schema, steps that are left out, and a tiny model from nothing to a report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from helm.benchmark.presentation.schema import read_schema
from helm.benchmark.runner import downsample_eval_instances
from helm.benchmark.scenarios.scenario import Input, Instance

from flexgen_helm.errors import FlexGenError
from flexgen_helm.evaluation.suites import find_suite
from flexgen_helm.evaluation.summarizer import PREFIX
from flexgen_helm.reports.presentation.words import FIGURES
from flexgen_helm.runs.accuracy_vs_compression.steps import SUITE, Step, Study, is_evaluated, run, run_steps, steps_of
from flexgen_helm.runs.accuracy_vs_compression.variants import VARIANTS
from tests.models import save_tiny
from tests.reports.synthetic import Answer, Suite
from tests.runs.test_suites import parse
from tests.tokenizers import save_character_tokenizer

ENTRIES = """entries: [
  {description: "lambada:path=%s,model=text"}
  {description: "perplexity:path=%s,piece_bytes=40,model=text"}
]"""


def test_the_schema_has_a_table_for_every_entry() -> None:
    schema = read_schema(str(find_suite(SUITE).schema))
    run_specs = parse(SUITE)
    assert {group for run_spec in run_specs for group in run_spec.groups} <= {group.name for group in schema.run_groups}
    shown = set(schema.run_groups[0].subgroups) - {"compression"}
    assert shown == {run_spec.groups[-1] for run_spec in run_specs}
    assert len(shown) == 7


def test_the_schema_names_figures_that_there_are() -> None:
    names = {metric.name for metric in read_schema(str(find_suite(SUITE).schema)).metrics}
    ours = {name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)}
    assert len(ours) == 6
    assert ours <= set(FIGURES)


def test_helm_draws_instances_at_random_and_the_same_each_time() -> None:
    instances = [Instance(Input(text=str(number)), references=[], split="test", id=str(number)) for number in range(100)]
    first, again, more = ([each.id for each in downsample_eval_instances(instances, most, ["test"])] for most in (10, 10, 20))
    assert first == again == more[:10]
    assert first != [str(number) for number in range(10)]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A tiny model, and a suite of two entries over texts of ours."""
    texts, suite = tmp_path / "texts", tmp_path / "little"
    texts.mkdir()
    suite.mkdir()
    (texts / "passages.txt").write_text("say one")
    (texts / "text.txt").write_text("Thank you all very much. " * 8)
    (suite / "run_entries.conf").write_text(ENTRIES % (texts / "passages.txt", texts / "text.txt"))
    shutil.copy(str(find_suite(SUITE).schema), suite)
    model = save_tiny("qwen3", tmp_path / "models")
    save_character_tokenizer(model)
    return Study(
        model=str(model), variants=("w3-minmax",), instances=3, fidelity_tokens=600, out=tmp_path / "out", suite=str(suite)
    )


def write_run(study: Study, entry: str, instances: int) -> None:
    evaluation = study.evaluation("w8")
    folder = Suite(evaluation.suite_folder, evaluation.deployment).run(entry, [Answer()])
    spec = json.loads((folder / "run_spec.json").read_text())
    spec["adapter_spec"]["max_eval_instances"] = instances
    (folder / "run_spec.json").write_text(json.dumps(spec))


def test_an_evaluation_is_done_when_all_entries_are_there_with_as_many_instances(study: Study) -> None:
    evaluation = study.evaluation("w8")
    assert not is_evaluated(evaluation)
    write_run(study, "a:x=1", 3)
    write_run(study, "b:x=1", 2)
    assert not is_evaluated(evaluation)
    write_run(study, "c:x=1", 3)
    assert is_evaluated(evaluation)
    assert not is_evaluated(study.evaluation("w3-minmax"))


def test_steps_that_are_done_are_left_out_and_a_failure_ends(capsys: pytest.CaptureFixture[str]) -> None:
    made: list[str] = []

    def step(name: str, *, done: bool = False, status: int = 0) -> Step:
        def do() -> int:
            made.append(name)
            return status

        return Step(name, lambda: done, do)

    assert run_steps([step("one", done=True), step("two"), step("three", status=3), step("four")]) == 3
    assert made == ["two", "three"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/4] one: done before"
    assert lines[1] == "[2/4] two"
    assert lines[-1] == "[3/4] three failed. The same command goes on from here."


def test_every_variant_has_its_steps(study: Study) -> None:
    titles = [step.title for step in steps_of(replace(study, variants=("w8", "w3-minmax")))]
    assert titles == [
        *("evaluate 16 bits", "evaluate w8", "evaluate w3-minmax"),
        *("fidelity of w8", "fidelity of w3-minmax"),
        *("HELM's tables", "report"),
    ]


def test_all_variants_are_names(study: Study) -> None:
    names = [study.evaluation(variant).deployment for variant in VARIANTS]
    assert len(set(names)) == len(VARIANTS)


def test_an_unknown_variant_is_named_before_anything_is_computed(study: Study) -> None:
    with pytest.raises(FlexGenError, match="w9"):
        run(replace(study, variants=("w8", "w9")))
    assert not study.out.exists()
