"""The matrix of faults: what it keeps, what it counts, and its short form."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from flexgen_helm.runs.fault_matrix import __main__ as command
from flexgen_helm.runs.fault_matrix import table
from flexgen_helm.runs.fault_matrix.outcomes import Case, Ledger, Outcome, merged
from flexgen_helm.runs.fault_matrix.worker import Worker
from tests.runs.stubborn import Stubborn


def test_a_case_that_hangs_dies_or_fails_is_counted_and_the_next_one_runs(tmp_path: Path) -> None:
    worker = Worker(Stubborn, tmp_path / "part", tmp_path / "log")
    try:
        found = [
            worker.run(Case(name, 600 if name != "hangs" else 1)) for name in ("one", "hangs", "two", "dies", "fails", "three")
        ]
    finally:
        worker.close()
    verdicts = [outcome.verdict for (outcome,) in found]
    assert verdicts == ["answered", "hung", "answered", "traceback", "traceback", "answered"]
    assert "status 3" in found[3][0].note
    assert "KeyError" in found[4][0].note


def test_what_is_done_is_there_for_the_next_process(tmp_path: Path) -> None:
    file, cases = tmp_path / "outcomes.jsonl", [Case(str(number), 1) for number in range(3)]
    ledger = Ledger(file)
    ledger.add("files", cases[0], [Outcome("cache", "refused")])
    ledger.add("files", cases[1], [Outcome("cache", "answered", 2)])
    file.write_text(file.read_text()[:-5])  # the process was killed while it wrote
    again = Ledger(file)
    assert [again.has("files", case) for case in cases] == [True, False, False]
    again.add("files", cases[2], [Outcome("slabs", "wrong", note="x")])
    assert Ledger(file).of("files", cases) == [Outcome("cache", "refused"), Outcome("slabs", "wrong", note="x")]
    assert not Ledger(file).has("clock", cases[0])


def test_the_table_counts_by_fault_and_names_failures() -> None:
    outcomes = merged([Outcome("cache", "refused"), Outcome("cache", "refused"), Outcome("slabs", "wrong", note="x")])
    assert outcomes == [Outcome("cache", "refused", 2), Outcome("slabs", "wrong", note="x")]
    parts = {"files": [*outcomes, Outcome("slabs", "skipped", note="no root")], "clock": [Outcome("back", "answered")]}
    lines = table.as_markdown(parts).splitlines()
    head = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert head[:4] == ["fault", "tried", "answered right", "refused by name"]
    assert cells["files: cache"][:3] == ["2", "0", "2"]
    assert cells["**files**"][0] == "3"
    assert cells["**all**"] == ["4", "1", "2", "0", "0", "0", "0", "0", "1"]
    assert table.failures(parts) == ["files: slabs: wrong: x", "files: slabs: skipped: no root"]
    assert table.as_json(parts)["files"]["counts"]["cache"]["refused"] == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_fault_of_the_short_form_loses_hangs_or_answers_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--scale", "short", "--state", str(tmp_path / "state"), "--json", str(tmp_path / "result.json")]
    monkeypatch.setattr(sys, "argv", ["fault_matrix", *arguments])
    assert command.main() == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "result.json").read_text())
    tried = {part: sum(sum(row.values()) for row in each["counts"].values()) for part, each in found.items()}
    assert tried == {name: kind.short for name, kind in command.KINDS.items()}
