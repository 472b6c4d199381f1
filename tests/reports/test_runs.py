"""What the reader finds in files that HELM wrote, against HELM's own reader, and what it says of damaged files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.augmentations.data_augmenter import DataAugmenterSpec
from helm.benchmark.augmentations.perturbation import PerturbationSpec
from helm.benchmark.metrics.metric import PerInstanceStats
from helm.benchmark.metrics.statistic import Stat as HelmStat
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import Runner
from helm.common.codec import from_json
from helm.common.general import asdict_without_nones

import flexgen_helm
from flexgen_helm.errors import CorruptFile
from flexgen_helm.helm.run_record import RUN_FILE, WORKLOAD_FILE
from flexgen_helm.reports.contents import Stat, Token
from flexgen_helm.reports.runs import HELM_FILES, Run, list_runs, only_run, read_workloads
from tests.helm.conftest import RunSuite
from tests.helm.fakes import FakeLoader, run_spec

ROOT = Path(flexgen_helm.__file__).parents[1]
LOWER = "helm.benchmark.augmentations.lowercase_perturbation.LowerCasePerturbation"
READERS: dict[str, Callable[[Run], Any]] = {
    "run_spec.json": lambda run: run.spec,
    "scenario_state.json": Run.requests,
    "stats.json": Run.stats,
    "per_instance_stats.json": Run.instance_stats,
    RUN_FILE: Run.record,
    WORKLOAD_FILE: lambda run: read_workloads(run.folder.parent),
}


FOREIGN: tuple[Any, ...] = ({}, [{}], [1], {"request_states": [{}]}, {"request_states": 3}, None, "text", 3)


def perturbed(spec: RunSpec) -> RunSpec:
    augmenter = DataAugmenterSpec(
        [PerturbationSpec(LOWER, {})], should_augment_eval_instances=True, should_include_original_eval=True
    )
    return replace(spec, data_augmenter_spec=augmenter)


SPECS = (
    run_spec(name="several", num_outputs=3, temperature=1.0, random="2"),
    run_spec("multiple_choice_joint"),
    perturbed(run_spec("multiple_choice_separate_calibrated", name="perturbed", words="Apple Pear Fig")),
)


@pytest.fixture
def suite(run_suite: RunSuite, loader: FakeLoader) -> Path:
    return run_suite(list(SPECS))


def as_json(perturbation: Any) -> str | None:
    return None if perturbation is None else json.dumps(asdict_without_nones(perturbation), sort_keys=True)


def helms(folder: Path, file: str, kind: Any) -> Any:
    """Reads a file with HELM's own reader."""
    return from_json((folder / file).read_text(), kind)


def test_runs_are_listed_by_name_and_their_specs_are_helms(suite: Path) -> None:
    (suite / "groups").mkdir()
    runs = list_runs(suite)
    assert [run.name for run in runs] == sorted(spec.name for spec in SPECS)
    assert all(run.is_complete and run.deployment == "flexgen/test/letters" for run in runs)
    assert {run.name: run.spec for run in runs} == {
        spec.name: json.loads(json.dumps(asdict_without_nones(spec))) for spec in SPECS
    }


def test_requests_are_those_that_helm_reads(suite: Path) -> None:
    modes, perturbations = set(), set()
    for run in list_runs(suite):
        states = helms(run.folder, "scenario_state.json", ScenarioState).request_states
        requests = run.requests()
        for request, state in zip(requests, states, strict=True):
            instance, result = state.instance, state.result
            assert (request.instance_id, request.split) == (instance.id, instance.split)
            assert request.perturbation == as_json(instance.perturbation)
            assert (request.train_trial, request.mode) == (state.train_trial_index, state.request_mode)
            assert request.reference_index == state.reference_index
            assert [(one.text, one.correct) for one in request.references] == [
                (reference.output.text, reference.is_correct) for reference in instance.references
            ]
            assert request.output_mapping == (state.output_mapping or {})
            assert request.prompt == request.asked["prompt"] == state.request.prompt
            assert request.asked["max_tokens"] == state.request.max_tokens
            assert (request.seconds, request.cached) == (result.request_time, result.cached)
            assert len(request.completions) == len(result.completions)
            for ours, theirs in zip(request.completions, result.completions, strict=True):
                assert (ours.text, ours.logprob) == (theirs.text, theirs.logprob)
                assert ours.tokens == tuple(Token(token.text, token.logprob) for token in theirs.tokens)
                assert ours.finish_reason == (theirs.finish_reason or {}).get("reason")
            modes.add(request.mode)
            perturbations.add(request.perturbation)
    assert modes == {None, "original", "calibration"}
    assert len(perturbations) == 2


def test_statistics_are_those_that_helm_reads(suite: Path) -> None:
    def plain(stat: HelmStat) -> Stat:
        name = stat.name
        return Stat(
            name.name,
            name.split,
            name.sub_split,
            as_json(name.perturbation),
            stat.count,
            stat.sum,
            stat.mean if stat.count else None,
        )

    for run in list_runs(suite):
        assert run.stats() == [plain(stat) for stat in helms(run.folder, "stats.json", list[HelmStat])]
        expected = helms(run.folder, "per_instance_stats.json", list[PerInstanceStats])
        for ours, theirs in zip(run.instance_stats(), expected, strict=True):
            assert (ours.instance_id, ours.perturbation) == (theirs.instance_id, as_json(theirs.perturbation))
            assert ours.train_trial == theirs.train_trial_index
            assert list(ours.stats) == [plain(stat) for stat in theirs.stats]


def test_requests_and_instance_statistics_join(suite: Path) -> None:
    for run in list_runs(suite):
        asked = {(one.instance_id, one.perturbation, one.train_trial) for one in run.requests()}
        assert {(one.instance_id, one.perturbation, one.train_trial) for one in run.instance_stats()} == asked


def test_our_records_are_there_only_where_we_served(run_suite: RunSuite, suite: Path) -> None:
    (served,) = read_workloads(suite)
    assert (served.deployment, served.runs) == ("flexgen/test/letters", tuple(sorted(spec.name for spec in SPECS)))
    assert served.num_requests == sum(len(run.requests()) for run in list_runs(suite))
    assert served.measured is not None
    assert served.measured["stats"]["seconds"] == 2.0
    record = list_runs(suite)[0].record()
    assert record is not None
    assert record["bits_per_weight"] == 32.0
    theirs = run_suite([run_spec(deployment="simple/model1")], Runner, suite="theirs")
    run = only_run(theirs)
    assert (run.record(), read_workloads(theirs), run.deployment) == (None, [], "simple/model1")


def test_an_earlier_measurement_is_not_this_workloads(run_suite: RunSuite, suite: Path) -> None:
    (again,) = read_workloads(run_suite(list(SPECS)))
    assert json.loads((suite / WORKLOAD_FILE).read_text())[0]["measured"] is not None
    assert again.num_cached == again.num_requests
    assert again.measured is None


def test_a_dry_run_has_prompts_and_no_answers(run_suite: RunSuite, suite: Path) -> None:
    dry = only_run(run_suite([SPECS[1]], suite="dry", execution={"dry_run": True})).requests()
    (run,) = [run for run in list_runs(suite) if run.name == SPECS[1].name]
    assert [request.prompt for request in dry] == [request.prompt for request in run.requests()]
    assert not any(request.completions or request.cached or request.seconds for request in dry)


def test_documents_are_helms_files(suite: Path) -> None:
    run = list_runs(suite)[0]
    assert run.documents() == {file: json.loads((run.folder / file).read_text()) for file in HELM_FILES}
    assert {path.name for path in run.folder.iterdir()} == {*HELM_FILES, RUN_FILE}
    (run.folder / HELM_FILES[-1]).unlink()
    assert set(run.documents()) == set(HELM_FILES[:-1])
    assert not run.is_complete


def path_of(run: Run, file: str) -> Path:
    return run.folder.parent / file if file == WORKLOAD_FILE else run.folder / file


@pytest.mark.parametrize("file", READERS)
def test_damaged_files_are_named_with_reason_and_advice(suite: Path, file: str) -> None:
    def refused(message: str) -> None:
        # Anew each time, since a run keeps its spec.
        with pytest.raises(CorruptFile, match=rf"^{re.escape(str(path))} {message}.*\. (Run|Remove) "):
            READERS[file](Run(run.folder))

    run = list_runs(suite)[0]
    path = path_of(run, file)
    whole = path.read_bytes()
    READERS[file](run)
    for torn in (b"", whole[: len(whole) // 2], whole[:-1], b"\xff" + whole, b"[" * 100_000):
        path.write_bytes(torn)
        refused("is not whole")
    foreign = "is not what (HELM|this package) writes"
    for content in FOREIGN:
        path.write_text(json.dumps(content))
        refused(foreign)
    path.unlink()
    path.mkdir()
    refused("cannot be read")
    path.rmdir()
    if file in (RUN_FILE, WORKLOAD_FILE):
        assert not READERS[file](run)
    else:
        refused("is missing")


def test_fields_of_another_kind_are_refused(suite: Path) -> None:
    run = list_runs(suite)[0]
    for file, field, value in (
        ("run_spec.json", "groups", "text"),
        ("run_spec.json", "adapter_spec", {"model_deployment": None}),
        ("scenario_state.json", "request_states", {"0": 1}),
        (RUN_FILE, "deployment", 3),
    ):
        path = run.folder / file
        whole = path.read_text()
        path.write_text(json.dumps({**json.loads(whole), field: value}))
        with pytest.raises(CorruptFile, match="is not what"):
            READERS[file](Run(run.folder))
        path.write_text(whole)


def test_one_run_is_asked_for_where_there_are_none_or_several(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"holds 3 runs .* Name a folder"):
        only_run(suite)
    with pytest.raises(CorruptFile, match=r"nothing holds 0 runs .* Name a folder"):
        only_run(tmp_path / "nothing")


def test_nothing_else_reads_these_files() -> None:
    names = [*HELM_FILES, RUN_FILE, WORKLOAD_FILE]
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))}|RUN_FILE|WORKLOAD_FILE|LAST_FILE)\b")
    reader = {ROOT / "flexgen_helm/reports" / name for name in ("runs.py", "contents.py")}
    writers = set((ROOT / "flexgen_helm/helm").glob("*.py"))
    # `plan --replay` reads a file that the user names, which may also be what `bench` printed.
    replay = {ROOT / "flexgen_helm" / name for name in ("cli_options.py", "runtime/planning/explain.py")}
    sources = {path for folder in ("flexgen_helm", "runs", "scenarios") for path in (ROOT / folder).rglob("*.py")}
    assert any(pattern.search(path.read_text()) for path in reader)
    assert [path for path in sources - reader - writers - replay if pattern.search(path.read_text())] == []
