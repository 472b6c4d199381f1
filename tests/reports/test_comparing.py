"""Joins and figures of runs that were made by hand, and what is refused with which words."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from flexgen_helm.cli import main
from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.reports import Choices, Comparison, compare
from flexgen_helm.reports.engine_record import NO_RECORD, NOTHING_COMPUTED
from flexgen_helm.reports.figures import FIGURE_COLUMNS
from flexgen_helm.reports.join import NotComparable
from flexgen_helm.reports.naming import OtherModel
from flexgen_helm.statistics.clustered import mean_with_error
from flexgen_helm.statistics.paired import paired_difference
from tests.reports.synthetic import NUMERICS, Answer, Suite

BASE, W4 = "flexgen/org/model", "flexgen/org/model@w4"
MMLU = "mmlu:subject=a"


@pytest.fixture(autouse=True)
def _no_kept_fidelity(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path_factory.mktemp("cache")))


def scored(scores: Sequence[float], **more: Any) -> list[Answer]:
    return [Answer(text="A" if score else "B", score=score, **more) for score in scores]


def two(folder: Path, before: Sequence[float], after: Sequence[float]) -> None:
    Suite(folder, BASE).run(MMLU, scored(before))
    Suite(folder, W4).run(MMLU, scored(after))


def compared(folder: Path, **choices: Any) -> Comparison:
    return compare(f"{folder}:{BASE}", [str(folder)], Choices(**choices))


def figure(comparison: Comparison, name: str, configuration: str = "@w4", level: str = "run", scenario: str = MMLU) -> Any:
    found = comparison.figures
    for column, value in (("configuration", configuration), ("level", level), ("scenario", scenario), ("figure", name)):
        found = found[found[column] == value]
    (line,) = found.to_dict("records")
    return line


def test_figures_of_pairs_are_those_that_can_be_counted(tmp_path: Path) -> None:
    before, after = [1, 1, 1, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 0, 0, 1]
    two(tmp_path, before, after)
    comparison = compared(tmp_path)
    assert list(comparison.figures.columns) == list(FIGURE_COLUMNS)
    value = {
        name: figure(comparison, name)["value"] for name in ("score", "score_before", "lost", "gained", "flips", "instances")
    }
    assert value == {"score": 4 / 8, "score_before": 6 / 8, "lost": 3, "gained": 1, "flips": 4 / 8, "instances": 8}
    assert figure(comparison, "recovery")["value"] == pytest.approx(100 * 4 / 6)
    assert figure(comparison, "p_value")["value"] == pytest.approx(binomtest(1, 4).pvalue)
    expected = paired_difference(before, after)
    difference = figure(comparison, "difference")
    assert difference["value"] == pytest.approx(-2 / 8)
    assert (difference["low"], difference["high"]) == pytest.approx(expected.interval)
    assert difference["note"] == "8 clusters: the interval is too narrow"
    assert figure(comparison, "standard_error")["value"] == pytest.approx(mean_with_error(after).standard_error)
    # (z_0.025 + z_0.2) sqrt(rate / pairs), arXiv 2605.28873
    assert figure(comparison, "minimum_detectable")["value"] == pytest.approx(
        (1.959964 + 0.841621) * math.sqrt(0.5 / 8), rel=1e-5
    )


def test_an_empty_figure_has_a_reason_and_a_full_one_has_a_value(tmp_path: Path) -> None:
    two(tmp_path, [1, 0], [1, 0])
    figures = compared(tmp_path).figures
    empty = figures[figures.value.isna()]
    assert not empty.empty
    assert (empty.note != "").all()
    assert figure(compared(tmp_path), "minimum_detectable")["note"].startswith("no pair differs")


def test_train_trials_of_an_instance_are_one_cluster(tmp_path: Path) -> None:
    scores = [[1, 0, 1, 1], [0, 0, 1, 1]]
    for name in (BASE, W4):
        answers = [
            Answer(score=score, trial=trial, instance=f"id{at}") for trial in (0, 1) for at, score in enumerate(scores[trial])
        ]
        Suite(tmp_path, name).run(MMLU, answers)
    expected = mean_with_error(scores[0] + scores[1], [0, 1, 2, 3] * 2).standard_error
    assert figure(compared(tmp_path), "standard_error")["value"] == pytest.approx(expected)


@pytest.mark.parametrize("subjects", [3, 20])
def test_subjects_are_clusters_of_the_suite_if_there_are_enough(tmp_path: Path, subjects: int) -> None:
    scores = {number: [float((number + at) % 3 > 0 and number % 2) for at in range(4)] for number in range(subjects)}
    for name in (BASE, W4):
        for number, values in scores.items():
            Suite(tmp_path, name).run(f"mmlu:subject={number}", scored(values))
    flat = [score for values in scores.values() for score in values]
    clusters = [number for number, values in scores.items() for _ in values] if subjects >= 20 else None
    found = figure(compared(tmp_path), "standard_error", level="suite", scenario="all runs")
    assert found["value"] == pytest.approx(mean_with_error(flat, clusters).standard_error)


def test_scores_that_are_no_shares_are_left_out_of_the_suite_and_named(tmp_path: Path) -> None:
    for name, logprob in ((BASE, -1.0), (W4, -2.0)):
        Suite(tmp_path, name).run(MMLU, scored([1, 0]))
        windows = [Answer(instance="id0", logprobs=(logprob, logprob)) for _ in range(3)]
        Suite(tmp_path, name).run("perplexity:path=x", windows, method="language_modeling", groups=["text"])
    schema = tmp_path / "schema.json"
    groups = {"mmlu": "exact_match", "text": "bits_per_byte"}
    run_groups = [{"name": name, "environment": {"main_name": main, "main_split": "test"}} for name, main in groups.items()]
    schema.write_text(json.dumps({"metrics": [{"name": "bits_per_byte", "lower_is_better": True}], "run_groups": run_groups}))
    comparison = compared(tmp_path)
    assert figure(comparison, "lost", level="suite", scenario="all runs")["value"] == 0
    assert "without perplexity:path=x" in figure(comparison, "score", level="suite", scenario="all runs")["note"]
    alone = {name: figure(comparison, name, scenario="perplexity:path=x") for name in ("score", "lost", "gained", "recovery")}
    assert alone["score"]["value"] == pytest.approx(2 / math.log(2))
    assert (alone["lost"]["value"], alone["gained"]["value"]) == (3, 0)
    assert alone["recovery"]["value"] == pytest.approx(50)
    assert figure(comparison, "logprob_change", scenario="perplexity:path=x")["value"] == pytest.approx(-2)


def test_perturbed_inputs_have_figures_of_their_own_and_the_other_split_counts_nowhere(tmp_path: Path) -> None:
    typos = {"name": "typos"}
    for name in (BASE, W4):
        answers = [*scored([1, 0]), *scored([0, 0], perturbation=typos), Answer(split="valid", instance="v")]
        Suite(tmp_path, name).run(MMLU, answers)
    figures = compared(tmp_path).figures
    scores = figures[(figures.figure == "score") & (figures.configuration == "@w4") & (figures.level == "run")]
    assert dict(zip(scores.perturbation, scores.value, strict=True)) == {"": 0.5, json.dumps(typos): 0.0}


def test_speed_and_size_come_from_the_record_and_one_measurement_counts_once(tmp_path: Path) -> None:
    for name in (BASE, W4):
        for subject in "ab":
            Suite(tmp_path, name).run(f"mmlu:subject={subject}", scored([1, 0]))
    comparison = compared(tmp_path)
    value = {
        name: figure(comparison, name, level="suite", scenario="all runs")["value"]
        for name in (
            *("tokens_per_second", "bits", "bits_per_weight", "bits_per_k_element", "bits_per_v_element"),
            *("weight_bytes_device", "limit_share"),
        )
    }
    # 1000 tokens in 2 s, measured for both runs together
    assert value == {
        "tokens_per_second": 500,
        "bits": 4.5,
        "bits_per_weight": 12,
        "bits_per_k_element": 5,
        "bits_per_v_element": 6,
        "weight_bytes_device": 1000,
        "limit_share": 0.5,
    }
    assert figure(comparison, "bits", configuration="16-bit")["value"] == 16
    assert comparison.baseline.name == "16-bit"


def test_runs_of_another_client_lack_figures_with_a_reason(tmp_path: Path) -> None:
    Suite(tmp_path, BASE).run(MMLU, scored([1, 0]))
    Suite(tmp_path, "huggingface/model", record=None).run(MMLU, scored([1, 1]))
    for baseline, name in ((BASE, "huggingface/model"), ("huggingface/model", "16-bit")):
        comparison = compare(f"{tmp_path}:{baseline}", [str(tmp_path)])
        foreign = figure(comparison, "bits", configuration="huggingface/model")
        assert math.isnan(foreign["value"])
        assert foreign["note"] == NO_RECORD
        assert figure(comparison, "kl_mean", configuration=name)["note"] == NO_RECORD
        assert figure(comparison, "flips", configuration=name)["value"] == 0.5


def test_no_speed_without_computed_answers(tmp_path: Path) -> None:
    Suite(tmp_path, BASE).run(MMLU, scored([1]))
    Suite(tmp_path, W4, {"measured": None}).run(MMLU, scored([1]))
    assert figure(compared(tmp_path), "tokens_per_second")["note"] == NOTHING_COMPUTED


def test_released_weights_of_16_bits_are_called_so_and_names_differ(tmp_path: Path) -> None:
    half = {**NUMERICS, "weights": {**NUMERICS["weights"], "dtype": "bfloat16"}}  # type: ignore[dict-item]
    Suite(tmp_path, BASE).run(MMLU, scored([1]))
    Suite(tmp_path, f"{BASE}+bfloat16", {"numerics": half}).run(MMLU, scored([1]))
    Suite(tmp_path, f"{BASE}+float32", {"released_dtype": "float32"}).run(MMLU, scored([1]))
    names = [each.name for each in compared(tmp_path).candidates]
    assert names == ["16-bit in bfloat16", "float32"]


def test_a_configuration_can_be_compared_with_itself(tmp_path: Path) -> None:
    Suite(tmp_path, BASE).run(MMLU, scored([1, 0]))
    comparison = compare(str(tmp_path), [str(tmp_path)])
    (candidate,) = comparison.candidates
    assert candidate.name != comparison.baseline.name == "16-bit"
    assert figure(comparison, "flips", configuration=candidate.name)["value"] == 0


def test_missing_instances_are_counted_on_both_sides(tmp_path: Path) -> None:
    Suite(tmp_path, BASE).run(MMLU, [*(Answer(instance=name) for name in "abcd"), Answer(instance="v", split="valid")])
    Suite(tmp_path, W4).run(MMLU, [Answer(instance=name) for name in "bcx"])
    comparison = compared(tmp_path)
    assert [figure(comparison, f"missing_{side}")["value"] for side in ("baseline", "candidate")] == [1, 2]
    assert figure(comparison, "instances")["value"] == 2
    assert set(comparison.joined["@w4"].rows.instance) == {"b", "c"}


def fidelity(folder: Path, reference: Any, candidate: Any, positions: int, kl: float) -> Path:
    values = {"mean": kl, "median": kl, "p99": kl, "p999": kl}
    figures = {"kl": values, "top1_agreement": 0.9, "delta_p": {"mean": 0.0, "rms": 0.1}, "perplexity_ratio": 1.1}
    bounds = {"kl": {name: [kl / 2, kl * 2] for name in values}, "top1_agreement": None, "perplexity_ratio": [1.0, 1.2]}
    content = {
        "reference": {"model": "x", "numerics": reference},
        "candidate": {"model": "x", "numerics": candidate},
        "text": {"source": "text", "positions": positions},
        **figures,
        "ci95": {**bounds, "delta_p": {"mean": None, "rms": None}},
    }
    file = folder / f"{positions}.json"
    file.write_text(json.dumps(content))
    return file


def test_fidelity_is_found_by_the_numerics_of_both_sides(tmp_path: Path) -> None:
    suite, kept = tmp_path / "suite", tmp_path / "kept"
    kept.mkdir()
    Suite(suite, BASE).run(MMLU, scored([1]))
    Suite(suite, W4, {"scheme": "w4"}).run(MMLU, scored([1]))
    ours = {**NUMERICS, "weights": {**NUMERICS["weights"], "scheme": "w4"}}  # type: ignore[dict-item]
    rows = {**NUMERICS["rows"], "gpu_batch_size": 16}  # type: ignore[dict-item]
    files = [
        fidelity(kept, NUMERICS, {**ours, "rows": rows}, 900, 0.3),
        fidelity(kept, NUMERICS, ours, 100, 0.1),
        fidelity(kept, NUMERICS, ours, 200, 0.2),
        fidelity(kept, ours, NUMERICS, 300, 0.4),
    ]
    found = figure(compared(suite, fidelity=files), "kl_mean")
    assert (found["value"], found["low"], found["high"]) == (0.2, 0.1, 0.4)
    other = figure(compared(suite, fidelity=files[:1]), "kl_mean")
    assert (other["value"], other["note"]) == (0.3, "900 predictions of text; with other row sizes or kernels")
    assert "no result of `flexgen-helm fidelity`" in figure(compared(suite, fidelity=files[3:]), "kl_mean")["note"]
    cache = Path(os.environ["FLEXGEN_HELM_CACHE"]) / "fidelity"
    cache.mkdir()
    (cache / "torn.json").write_text("{")
    (cache / "x.json").write_text(files[1].read_text())
    assert figure(compared(suite), "kl_mean")["value"] == 0.1
    with pytest.raises(CorruptFile, match=r"torn\.json cannot be read as a result of fidelity"):
        compared(suite, fidelity=[cache / "torn.json"])


def refused(folder: Path, error: type[FlexGenError], match: str, *options: str, **names: Any) -> None:
    """Checks the error from Python, and the line and exit status of the command."""
    baseline, candidates = names.get("baseline", f"{folder}:{BASE}"), names.get("candidates", [str(folder)])
    with pytest.raises(error, match=match):
        compare(baseline, candidates, Choices(output_path=folder))
    command = ["report", "--baseline", baseline, "--candidates", *candidates, "--out", str(folder / "out"), *options]
    assert main([*command, "--output-path", str(folder)]) == 2
    assert not (folder / "out").exists()


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    two(tmp_path, [1], [1])
    refused(tmp_path, FlexGenError, "There is no suite `nothing`", baseline="nothing")
    refused(tmp_path, FlexGenError, r"has no runs in .* Write one of `flexgen/org/model`, ", candidates=[f"{tmp_path}:@w9"])
    refused(tmp_path, FlexGenError, "holds runs of several models", baseline=str(tmp_path))
    refused(tmp_path, FlexGenError, "is given twice", candidates=[str(tmp_path), f"{tmp_path}:@w4"])
    (tmp_path / "empty").mkdir()
    refused(tmp_path, FlexGenError, "holds no runs of HELM", candidates=[str(tmp_path / "empty")])


def test_a_suite_is_found_by_name_and_a_model_by_the_end_of_its_name(tmp_path: Path) -> None:
    two(tmp_path / "runs" / "v1", [1], [1])
    comparison = compare("v1:org/model", ["v1:@w4"], Choices(output_path=tmp_path))
    assert [comparison.baseline.deployment, comparison.candidates[0].deployment] == [BASE, W4]


def test_a_missing_run_is_refused_or_left_out_as_wished(tmp_path: Path) -> None:
    two(tmp_path, [1, 0], [1, 1])
    Suite(tmp_path, BASE).run("mmlu:subject=b", scored([1]))
    refused(tmp_path, NotComparable, r"`flexgen/org/model@w4` has no run `mmlu:subject=b`, .*--common-runs")
    comparison = compared(tmp_path, common_runs=True)
    assert comparison.joined["@w4"].left_out == ("mmlu:subject=b",)
    assert set(comparison.joined["@w4"].rows.scenario) == {MMLU}


def test_half_written_runs_are_refused(tmp_path: Path) -> None:
    two(tmp_path, [1, 0], [1, 1])
    (folder,) = tmp_path.glob("*@w4")
    file, last = folder / "scenario_state.json", folder / "per_instance_stats.json"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, CorruptFile, r"scenario_state\.json is not whole")
    file.write_bytes(whole)
    last.unlink()
    refused(tmp_path, CorruptFile, "did not end")


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    two(tmp_path, [1], [1])
    (folder,) = tmp_path.glob("*@w4")
    again = folder.with_name(f"{folder.name},model_deployment=x")
    again.mkdir()
    for file in folder.iterdir():
        (again / file.name).write_bytes(file.read_bytes())
    refused(tmp_path, CorruptFile, "Two runs of .* have one name, `mmlu:subject=a`")


def test_another_model_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    Suite(tmp_path, BASE).run(MMLU, scored([1]))
    other = {**NUMERICS, "weights": {**NUMERICS["weights"], "digest": "other"}}  # type: ignore[dict-item]
    Suite(tmp_path, "flexgen/their/model", {"numerics": other}).run(MMLU, scored([0]))
    refused(tmp_path, OtherModel, r"is another model than .* digests .*--other-models")
    assert figure(compared(tmp_path, other_models=True), "lost", "16-bit in float32")["value"] == 1
    foreign = tmp_path / "foreign"
    Suite(foreign, BASE).run(MMLU, scored([1]))
    Suite(foreign, "openai/gpt", record=None).run(MMLU, scored([1]))
    refused(foreign, OtherModel, "the names are model and gpt")


def test_other_prompts_are_refused_with_the_first_difference(tmp_path: Path) -> None:
    Suite(tmp_path, BASE).run(MMLU, scored([1, 0], prompt="The question of {instance} is long enough. Answer:"))
    Suite(tmp_path, W4).run(MMLU, scored([1, 0], prompt="The question of {instance} is long enough! Answer:"))
    refused(
        tmp_path,
        NotComparable,
        r"in 2 rows.*instance id0 of `mmlu:subject=a`: `prompt` differs from character 34 on: '.*\. Ans",
    )


def test_other_parameters_are_other_requests(tmp_path: Path) -> None:
    two(tmp_path, [1], [1])
    (folder,) = tmp_path.glob("*@w4")
    file = folder / "scenario_state.json"
    file.write_text(file.read_text().replace('"max_tokens": 4', '"max_tokens": 5'))
    refused(tmp_path, NotComparable, r"`max_tokens` is 4 and 5")


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    Suite(tmp_path, BASE).run(MMLU, [Answer(instance="a")])
    Suite(tmp_path, W4).run(MMLU, [Answer(instance="b")])
    refused(tmp_path, NotComparable, "no instance in common")
