"""What is read from HELM's files, and the table that is made of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm.errors import CorruptFile
from flexgen_helm.evaluation.commands import Evaluation
from flexgen_helm.evaluation.scores import Before, Score, Work, read_scores, read_work
from flexgen_helm.evaluation.suites import Suite, find_suite
from flexgen_helm.evaluation.table import render_scores, render_work
from flexgen_helm.helm.run_record import WORKLOAD_FILE

TYPOS = {"name": "typos"}
NOTHING = Before()


def stat(name: str, mean: float, split: str = "test", count: int = 1, **more: Any) -> dict[str, Any]:
    return {"name": {"name": name, "split": split, **more}, "count": count, "sum": mean * count, "mean": mean}


def write_run(
    evaluation: Evaluation,
    name: str,
    groups: Sequence[str],
    stats: Sequence[dict[str, Any]],
    *,
    instances: Sequence[str],
    prompt_tokens: int = 10,
    deployment: str | None = None,
    scenario: str = "helm.benchmark.scenarios.commonsense_scenario.PiqaScenario",
) -> Path:
    """Writes what HELM would; `instances` are the splits of one request each."""
    folder = evaluation.suite_folder / name
    folder.mkdir(parents=True)
    run_spec = {
        "groups": list(groups),
        "adapter_spec": {"model_deployment": deployment or evaluation.deployment},
        "scenario_spec": {"class_name": scenario, "args": {}},
    }
    states = [
        {
            "instance": {"id": f"id{at // 2}", "split": split, "references": []},
            "train_trial_index": 0,
            "request": {"prompt": "Why?"},
        }
        for at, split in enumerate(instances)
    ]
    counted = [{"train_trial_index": 0, "stats": [stat("num_prompt_tokens", prompt_tokens, split)]} for split in instances[::2]]
    contents = {
        "run_spec": run_spec,
        "stats": list(stats),
        "scenario_state": {"request_states": states},
        "per_instance_stats": counted,
    }
    for file, content in contents.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def quickstart(tmp_path: Path) -> Evaluation:
    return Evaluation("flexgen/a/b", find_suite("quickstart"), tmp_path, 3)


def test_scores_are_the_main_metric_of_the_main_split(quickstart: Evaluation) -> None:
    stats = [
        stat("exact_match", 0.1, perturbation=TYPOS),
        {"name": {"name": "exact_match"}, "count": 0},
        stat("exact_match", 0.25),
        stat("exact_match", 0, "valid"),
    ]
    splits = ["test"] * 4 + ["valid"] * 2
    write_run(quickstart, "mmlu:subject=anatomy,model=a_b", ["mmlu"], stats, instances=splits)
    groups = ["synthetic_reasoning", "synthetic_reasoning_pattern_match"]
    name = "synthetic:mode=x,model=a_b,model_deployment=c_a_b,groups=x"
    write_run(quickstart, name, groups, [stat("quasi_exact_match", 0.5)], instances=["test"])
    assert read_scores(quickstart, NOTHING) == [
        Score("mmlu:subject=anatomy", "exact_match", 0.25, instances=2, requests=6, prompt_tokens=60),
        Score("synthetic:mode=x,groups=x", "quasi_exact_match", 0.5, instances=1, requests=1, prompt_tokens=10),
    ]


def test_without_a_schema_the_scenario_names_the_metric_and_else_helms_schema(tmp_path: Path) -> None:
    evaluation = Evaluation("flexgen/a/b", Suite("mine", tmp_path / "run_entries.conf", packaged=False), tmp_path, 3)
    natural = "helm.benchmark.scenarios.synthetic_reasoning_natural_scenario.SRNScenario"
    run = write_run(evaluation, "a:model=b", ["x"], [stat("f1_set_match", 0.5)], instances=["test"], scenario=natural)
    run_spec = json.loads((run / "run_spec.json").read_text())
    run_spec["scenario_spec"]["args"] = {"difficulty": "easy"}
    (run / "run_spec.json").write_text(json.dumps(run_spec))
    # HELM's scenario has no metadata, its classic schema has the group.
    write_run(evaluation, "b:model=b", ["synthetic_reasoning"], [stat("quasi_exact_match", 0.7)], instances=["test"])
    write_run(evaluation, "c:model=b", ["no such group"], [stat("exact_match", 1)], instances=["test"])
    # Both groups have a main metric; the last is the narrower one.
    write_run(evaluation, "d:model=b", ["mmlu", "synthetic_reasoning"], [stat("quasi_exact_match", 0.2)], instances=["test"])
    scores = [(score.run, score.metric, score.value, score.instances) for score in read_scores(evaluation, NOTHING)]
    assert scores == [
        ("a", "f1_set_match", 0.5, 1),
        ("b", "quasi_exact_match", 0.7, 1),
        ("c", None, None, 1),
        ("d", "quasi_exact_match", 0.2, 1),
    ]


def test_only_runs_of_this_command_and_model_count(quickstart: Evaluation) -> None:
    write_run(quickstart, "mmlu:model=a_b", ["mmlu"], [stat("exact_match", 1)], instances=["test"])
    write_run(quickstart, "mmlu:model=c", ["mmlu"], [], instances=["test"], deployment="flexgen/x/c")
    (quickstart.suite_folder / "empty").mkdir()
    unfinished = write_run(quickstart, "unfinished:model=a_b", ["mmlu"], [], instances=["test"])
    (unfinished / "per_instance_stats.json").unlink()
    assert [score.run for score in read_scores(quickstart, NOTHING)] == ["mmlu"]
    before = Before.of(quickstart.suite_folder)
    assert read_scores(quickstart, before) == []
    last = quickstart.suite_folder / "mmlu:model=a_b" / "per_instance_stats.json"
    new = last.with_name("new")
    new.write_text(last.read_text())
    os.utime(new, (0, 0))  # as where the clock was set back
    new.replace(last)
    assert [score.run for score in read_scores(quickstart, before)] == ["mmlu"]


def test_a_torn_file_is_named(quickstart: Evaluation) -> None:
    torn = write_run(quickstart, "mmlu:model=a_b", ["mmlu"], [], instances=["test"]) / "stats.json"
    torn.write_text("[{")
    with pytest.raises(CorruptFile, match=re.escape(f"{torn} is not whole")):
        read_scores(quickstart, NOTHING)


def test_a_split_that_was_not_drawn_has_no_score(quickstart: Evaluation) -> None:
    stats = [stat("exact_match", 1, "valid")]
    write_run(quickstart, "mmlu:model=a_b", ["mmlu"], stats, instances=["valid"])
    (score,) = read_scores(quickstart, NOTHING)
    assert (score.metric, score.value, score.instances, score.requests) == ("exact_match", None, 0, 1)
    assert render_scores([score]).splitlines()[1].split() == ["mmlu", "exact_match", "-", "0", "1", "10"]


def test_work_is_that_of_this_command_and_model(quickstart: Evaluation) -> None:
    assert read_work(quickstart, NOTHING) is None
    stats = {"prompt_tokens_asked": 4000, "prompt_tokens_computed": 1000, "seconds": 2.0, "new": 1}
    date = "2020-01-01T00:00:00.000+00:00"
    measured = {"date": date, "stats": stats, "bound_by": None, "what_would_help": None}
    counts = {"num_requests": 14, "num_cached": 3, "num_resumed": 1}
    own = {"deployment": "flexgen/a/b", "date": date, **counts, "measured": measured, "engine": {}}
    file = quickstart.suite_folder / WORKLOAD_FILE
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([own, {**own, "deployment": "flexgen/x/c"}]))
    work = read_work(quickstart, NOTHING)
    assert work == Work(14, 4, 2.0, 4000, 1000)
    # What an earlier command has measured is not this one's.
    for other in ({"date": "2019-12-31T00:00:00.000+00:00"}, None):
        file.write_text(json.dumps([{**own, "measured": other and {**measured, **other}, "num_cached": 14, "num_resumed": 0}]))
        assert read_work(quickstart, NOTHING) == Work(14, 14, 0, 0, 0)
    file.write_text(json.dumps([own]))
    before = Before.of(quickstart.suite_folder)
    assert read_work(quickstart, before) is None
    early = "1970-01-01T00:00:00.000+00:00"  # as where the clock was set back
    file.write_text(json.dumps([own, {**own, "date": early, "measured": {**measured, "date": early}}]))
    assert read_work(quickstart, before) == Work(14, 4, 2.0, 4000, 1000)
    file.write_text("torn")
    assert Before.of(quickstart.suite_folder).workloads == ()
    assert render_work(work) == (
        "10 requests in 2 s, 5.00 requests/s (4 more were answered before). Prompt tokens: 4,000 asked, 1,000 computed "
        "(4.0 times fewer, because shared prefixes are computed once)."
    )


def test_what_would_help_is_said() -> None:
    line = render_work(Work(3, 0, 2.0, 9, 9, "reading weights from the disk", "more host memory")).splitlines()[1]
    assert line == "Most time went into reading weights from the disk. What helps: more host memory."


def test_rate_is_not_made_up_when_nothing_was_computed() -> None:
    assert render_work(Work(3, 3, 0.0, 0, 0)) == "All 3 requests were answered before."


def test_table_is_aligned_and_ends_with_the_mean_of_one_metric() -> None:
    scores = [Score("mmlu:a", "exact_match", 0.25, 10, 1000, 12345), Score("mmlu:bcd", "exact_match", 0.5, 2, 2, 5)]
    assert render_scores(scores).splitlines() == [
        "run entry  metric       score  instances  requests  prompt tokens",
        "mmlu:a     exact_match  0.250         10     1,000         12,345",
        "mmlu:bcd   exact_match  0.500          2         2              5",
        "mean of 2  exact_match  0.375         12     1,002         12,350",
    ]
    assert len(render_scores(scores[:1]).splitlines()) == 2
    assert len(render_scores([*scores, Score("x", "rouge_2", 0.5, 2, 2, 5)]).splitlines()) == 4
