"""The suites of the package: HELM parses every entry, and those whose data is here run on a tiny model."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
from helm.benchmark.presentation.run_entry import RunEntry, read_run_entries
from helm.benchmark.presentation.schema import get_default_schema_path, read_schema
from helm.benchmark.run import run_entries_to_run_specs
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.scenarios.entity_data_imputation_scenario import EntityDataImputationScenario
from helm.benchmark.scenarios.entity_matching_scenario import EntityMatchingScenario
from rouge_score.rouge_scorer import RougeScorer

import flexgen_helm.plugin  # noqa: F401  registers run specs and the generators of deployments
from flexgen_helm.assets import install_helm_data
from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.evaluation.commands import Evaluation
from flexgen_helm.evaluation.preparation import place_data
from flexgen_helm.evaluation.suites import find_suite, packaged_suites
from flexgen_helm.helm.registry import ENGINES
from flexgen_helm.helm.runner import FlexGenRunner
from tests.helm.conftest import execution_spec
from tests.models import save_tiny
from tests.tokenizers import save_character_tokenizer

FACTS = packaged_suites()["flexgen_paper"].data / "wikifact" / "data"
AREA = re.compile(r"phone: (\d+)/")


def parse(suite: str, model: str = "some/model", instances: int = 100) -> list[RunSpec]:
    """Returns the run specs of a suite as helm-run makes them."""
    register_model_deployment(ModelDeployment("some/model", ClientSpec("helm.clients.simple_client.SimpleClient")))
    entries = read_run_entries([str(find_suite(suite).run_entries)]).entries
    return run_entries_to_run_specs(entries, max_eval_instances=instances, models_to_run=[model])


@pytest.mark.parametrize("suite", sorted(packaged_suites()))
def test_every_entry_is_one_run(suite: str) -> None:
    run_specs, entries = parse(suite), read_run_entries([str(find_suite(suite).run_entries)]).entries
    assert len(run_specs) == len(entries)
    assert len({run_spec.name for run_spec in run_specs}) == len(entries)
    assert {run_spec.adapter_spec.max_eval_instances for run_spec in run_specs} == {100}


def test_quickstart_has_a_table_for_every_entry() -> None:
    schema = read_schema(str(find_suite("quickstart").schema))
    environments = {group.name for group in schema.run_groups if group.environment}
    run_specs = parse("quickstart")
    assert all(set(run_spec.groups) <= environments for run_spec in run_specs)
    assert len(schema.run_groups[0].subgroups) == len(run_specs)
    assert Counter(run_spec.adapter_spec.method for run_spec in run_specs) == {
        "generation": 2,
        "language_modeling": 1,
        "multiple_choice_joint": 1,
        "multiple_choice_separate_original": 2,
    }


def test_mmlu_has_every_subject_of_helm() -> None:
    """HELM's schema of its MMLU leaderboard names a group for each subject."""
    groups = read_schema(str(Path(get_default_schema_path()).with_name("schema_mmlu.yaml"))).run_groups
    subjects = {group.name.removeprefix("mmlu_") for group in groups if group.name.startswith("mmlu_") and not group.subgroups}
    assert len(subjects) == 57
    assert {run_spec.scenario_spec.args["subject"] for run_spec in parse("mmlu")} == subjects


def test_the_papers_settings() -> None:
    """Method, examples, outputs, temperature, tokens and stop that HELM gave the paper's seven sub-scenarios."""

    def settings(spec: AdapterSpec) -> tuple[Any, ...]:
        return spec.method, spec.max_train_instances, spec.num_outputs, spec.temperature, spec.max_tokens, spec.stop_sequences

    run_specs = parse("flexgen_paper")
    assert [settings(run_spec.adapter_spec) for run_spec in run_specs[:7]] == [
        *[("generation", 5, 5, 1.0, 8, ["\n"])] * 2,
        # Five candidates for the one token; HELM asks for one completion.
        *[("multiple_choice_joint", 5, 5, 0.0, 1, ["\n"])] * 2,
        ("generation", 5, 1, 0.0, 50, ["\n"]),
        ("generation", 3, 1, 0.0, 20, ["\n"]),
        ("generation", 5, 1, 0.3, 64, ["###"]),
    ]
    augmented = [bool(run_spec.data_augmenter_spec.perturbation_specs) for run_spec in run_specs]
    assert augmented == [False, False, True, True] + [False] * 14
    for plain, with_augmentation in zip(run_specs[7:9], run_specs[2:4], strict=True):
        assert (plain.adapter_spec, plain.scenario_spec) == (with_augmentation.adapter_spec, with_augmentation.scenario_spec)
    assert [run_spec.groups for run_spec in run_specs[9:]] == [["entity_matching"]] * 7 + [["entity_data_imputation"]] * 2


def test_the_papers_schema_has_a_table_for_every_entry() -> None:
    schema = read_schema(str(find_suite("flexgen_paper").schema))
    groups = {group for run_spec in parse("flexgen_paper") for group in run_spec.groups}
    assert groups <= {group.name for group in schema.run_groups if group.environment}
    assert set(schema.run_groups[0].subgroups) == groups - {"synthetic_reasoning"} | {"compression"}


def test_hand_made_restaurants_are_what_helms_scenarios_read(tmp_path: Path) -> None:
    """A match has the same telephone number in both tables, and an area code belongs to one city."""
    place_data(Evaluation("flexgen/a/b", replace(find_suite("flexgen_paper"), packaged=False), tmp_path, 2))
    matching = EntityMatchingScenario("Fodors_Zagats").get_instances(str(tmp_path / "scenarios" / "entity_matching"))
    assert Counter(instance.split for instance in matching) == {"train": 20, "valid": 12, "test": 12}
    for instance in matching:
        first, second = (number.replace("/", "-") for number in re.findall(r"phone: (\S+?)\. ", instance.input.text))
        assert instance.references[0].output.text == ("Yes" if first == second else "No")
    imputation = EntityDataImputationScenario("Restaurant").get_instances(
        str(tmp_path / "scenarios" / "entity_data_imputation")
    )
    cities = {(str(found[1]), one.references[0].output.text) for one in imputation if (found := AREA.search(one.input.text))}
    assert len(imputation) == 44
    assert len(cities) == len(dict(cities)) == 6


def test_xsum_is_helms_but_for_the_metrics() -> None:
    ours, helms = (
        run_entries_to_run_specs([RunEntry(f"{name}:temperature=0.3,model=some/model")])[0]
        for name in ("xsum_rouge", "summarization_xsum_sampled")
    )
    assert (ours.adapter_spec, ours.scenario_spec) == (helms.adapter_spec, helms.scenario_spec)
    assert ours.groups == helms.groups


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output folder with the data of the paper's suite in it."""
    try:
        install_helm_data(tmp_path)
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))
    place_data(Evaluation("flexgen/a/b", find_suite("flexgen_paper"), tmp_path, 2))
    return tmp_path


def run(run_specs: list[RunSpec], output: Path) -> list[dict[str, Any]]:
    """Runs a suite and returns the parsed files of each run."""
    options = dict.fromkeys(("skip_instances", "cache_instances", "cache_instances_only", "skip_completed_runs"), False)
    spec = execution_spec(output / "local")
    try:
        FlexGenRunner(spec, str(output), "suite", exit_on_error=True, **options).run_all(run_specs)
    finally:
        ENGINES.close()
    folders = [output / "runs" / "suite" / run_spec.name for run_spec in run_specs]
    return [{file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")} for folder in folders]


def mean(files: dict[str, Any], metric: str) -> float:
    name = {"name": metric, "split": "test"}
    return float(next(stat["mean"] for stat in files["stats"] if stat["name"] == name))


def tiny_model(folder: Path) -> str:
    model = save_tiny("qwen3", folder)
    save_character_tokenizer(model)
    return f"flexgen/{model}"


def test_the_papers_suite_runs(output: Path, tmp_path: Path) -> None:
    """Without what is downloaded: word lists for augmentation, and most tables of data wrangling."""
    all_entries = read_run_entries([str(find_suite("flexgen_paper").run_entries)]).entries
    here = re.compile(r"(?!entity_|.*augmentation)|.*(Fodors_Zagats|Restaurant)")
    entries = [RunEntry(entry.description) for entry in all_entries if here.match(entry.description)]
    run_specs = run_entries_to_run_specs(entries, max_eval_instances=2, models_to_run=[tiny_model(tmp_path / "models")])
    runs = run(run_specs, output)
    states = [files["scenario_state"]["request_states"] for files in runs]
    assert [len(run_states) for run_states in states] == [2] * 9
    assert [len(run_states[0]["result"]["completions"]) for run_states in states] == [5, 5, *[1] * 7]
    facts = {json.loads(line)["template"] for line in (FACTS / "test.jsonl").read_text().splitlines()}
    dev = {json.loads(line)["template"] for line in (FACTS / "dev.jsonl").read_text().splitlines()}
    assert {state["instance"]["input"]["text"] for state in (*states[0], *states[1])} <= facts | dev
    assert_rouge(runs[4])


def assert_rouge(xsum: dict[str, Any]) -> None:
    """Compares with the scores of Google's package over the same texts."""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [
        scorer.score(state["instance"]["references"][0]["output"]["text"], state["result"]["completions"][0]["text"].strip())
        for state in xsum["scenario_state"]["request_states"]
    ]
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert mean(xsum, ours) == pytest.approx(sum(score[theirs].fmeasure for score in scores) / len(scores))


def test_two_subjects_of_mmlu_run(output: Path, tmp_path: Path) -> None:
    run_specs = parse("mmlu", tiny_model(tmp_path / "models"), instances=2)
    chosen = [run_specs[0], run_specs[-1]]
    for run_spec, files in zip(chosen, run(chosen, output), strict=True):
        assert files["run_spec"]["scenario_spec"]["args"] == run_spec.scenario_spec.args
        assert len(files["scenario_state"]["request_states"]) == 2
