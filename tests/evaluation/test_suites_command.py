"""`flexgen-helm suites`: what it lists, and counts that are those of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexgen_helm import FlexGenError, evaluate
from flexgen_helm.cli import main
from flexgen_helm.evaluation import suites_command
from flexgen_helm.evaluation.size import EntrySize, Size, SuiteSize
from flexgen_helm.evaluation.suites import find_suite, packaged_suites
from flexgen_helm.helm.registry import ENGINES
from flexgen_helm.reports.runs import read_workloads

DYCK = '{description: "dyck_language:num_parenthesis_pairs=%d,model=text", priority: 1}'
UNKNOWN = '{description: "custom_mcqa:path=/no/such/file.jsonl,model=text", priority: 1}'


def test_every_suite_is_listed_with_its_first_comment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["suite", "entries"]
    found = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines}
    assert set(found) == set(packaged_suites())
    assert found["quickstart"] == ["6", "One entry of each kind of request."]
    assert found["mmlu"][0] == "57"
    assert all(len(words) == 2 for words in found.values())


def test_one_suite_is_listed_with_its_entries(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites", "--suite", "quickstart", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["entries"]) == ("quickstart", find_suite("quickstart").entries)
    assert main(["suites", "--suite", "quickstart"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == f"  {listed['entries'][0]}"


def test_an_unknown_suite_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites", "--suite", "quick"]) == 2
    assert "There is no suite `quick`" in capsys.readouterr().err


@pytest.mark.slow
def test_counts_are_those_of_a_run_and_what_is_missing_has_a_reason(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, out = tmp_path / "brackets", tmp_path / "out"
    suite.mkdir()
    file = suite / "run_entries.conf"
    file.write_text(f"entries: [{', '.join([DYCK % 2, DYCK % 3, UNKNOWN])}]")
    asked = ["suites", "--suite", str(suite), "--model", str(tiny_model), "-m", "4", "--out", str(out)]
    asked += ["--machine", "laptop-8gib"]
    assert main([*asked, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    first, second, missing = listed["runs"]
    assert (missing["size"], missing["run"].startswith("custom_mcqa")) == (None, True)
    assert "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/file.jsonl'" in missing["reason"]
    assert not list(out.glob("runs/*/*/stats.json"))

    file.write_text(f"entries: [{', '.join([DYCK % 2, DYCK % 3])}]")
    try:
        frame, paths = evaluate(tiny_model, suite=suite, max_instances=4, out=out)
    finally:
        ENGINES.close()
    (workload,) = read_workloads(paths.suite)
    assert workload.measured is not None
    stats, whole = workload.measured["stats"], listed["size"]
    assert [run["run"] for run in (first, second)] == list(frame.index)
    assert [run["size"]["requests"] for run in (first, second)] == list(frame.requests)
    assert [run["size"]["prompt_tokens_asked"] for run in (first, second)] == list(frame.prompt_tokens)
    assert whole["prompt_tokens_asked"] == stats["prompt_tokens_asked"] == sum(frame.prompt_tokens)
    assert whole["prompt_tokens_computed"] == stats["prompt_tokens_computed"] < whole["prompt_tokens_asked"]
    assert whole["new_tokens"] == 8 * 5 >= stats["generated_tokens"]
    assert whole["hours"] > 0
    assert listed["machine"] == "laptop-8gib"


def test_a_table_has_a_line_for_each_run_and_the_reason_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = Size(requests=4, prompt_tokens_asked=1600, prompt_tokens_computed=900, new_tokens=20, hours=1.5)
    entries = [EntrySize("dyck_language_np=2", size), EntrySize("custom_mcqa", None, "no network")]
    monkeypatch.setattr(suites_command, "_measured", lambda *_: SuiteSize(entries, size, "laptop"))
    assert main(["suites", "--suite", "quickstart", "--model", "m"]) == 0
    header, dyck, custom, together, note, where = capsys.readouterr().out.splitlines()
    assert header.split() == ["quickstart", "requests", "prompt", "tokens", "computed", "new", "tokens", "hours"]
    assert dyck.split() == ["dyck_language_np=2", "4", "1,600", "900", "20", "1.500"]
    assert custom.split()[1:] == ["-"] * 5
    assert together.split()[2:] == dyck.split()[1:]
    assert note == "custom_mcqa: no network"
    assert where.startswith("hours: predicted for laptop, ")


def test_a_suite_that_cannot_be_sized_does_not_keep_others_from_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run_entries.conf").write_text(f"entries: [{UNKNOWN}]")
    one, other = find_suite(str(tmp_path)), find_suite("quickstart")
    monkeypatch.setattr(suites_command, "packaged_suites", lambda: {"one": one, "quickstart": other})
    monkeypatch.setattr(
        "flexgen_helm.assets.helm_data.helm_data_folders",
        lambda: (_ for _ in ()).throw(FlexGenError("no network")),
    )
    asked = ["suites", "--model", str(tiny_model), "--out", str(tmp_path / "out"), "--machine", "laptop-8gib"]
    assert main(asked) == 0
    _, first, second, missing, refused, _ = capsys.readouterr().out.splitlines()
    assert first.split() == [one.name, "1", *["-"] * 5]
    assert second.split() == ["quickstart", "6", *["-"] * 5]
    assert "without 1 of 1 runs: custom_mcqa" in missing
    assert refused == "quickstart: no network"
