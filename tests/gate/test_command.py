"""The whole command: exit status, files, baseline files in the place of runs, and bad input in one clear line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flexgen_helm.cli import main
from flexgen_helm.gate.checking import Check, check
from tests.gate.made import BASE, MACHINE, W4, run_folders
from tests.reports.synthetic import Answer, Suite


@pytest.fixture(autouse=True)
def _no_kept_fidelity(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Suites `before` and `same` of equal bits, `worse`, of which a fourth of the answers is lost, and `gate.yaml`."""
    run_folders(tmp_path / "before")
    run_folders(tmp_path / "same")
    run_folders(tmp_path / "worse", answers=[Answer(text="B", score=0.0) for _ in range(20)])
    (tmp_path / "gate.yaml").write_text("gates: {lossless: {required: true}}\n")
    return tmp_path


def run(folder: Path, *words: str) -> int:
    paths = [str(folder / word) if (folder / word.partition(":")[0]).exists() else word for word in words]
    return main(["check", *paths])


def test_exit_status_and_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--junit", str(folder / "out/junit.xml"), "--json", str(folder / "out/check.json")]
    assert run(folder, "--baseline", "before", "--candidate", "same", "--config", "gate.yaml", *files) == 0
    assert "lossless        passes" in capsys.readouterr().out
    assert json.loads((folder / "out/check.json").read_text())["status"] == 0
    assert ElementTree.parse(folder / "out/junit.xml").getroot().find("testsuite").get("failures") == "0"  # type: ignore[union-attr]
    assert run(folder, "--baseline", "before", "--candidates", "same", "worse", *files) == 1
    shown = capsys.readouterr().out
    assert "REGRESSION: flips of all runs" in shown
    assert [each["result"] for each in json.loads((folder / "out/check.json").read_text())["candidates"]] == [
        "passes",
        "REGRESSION",
    ]
    (folder / "strict.yaml").write_text("gates: {margin: {required: true}}\n")
    assert run(folder, "--baseline", "before", "--candidate", "same", "--config", "strict.yaml") == 2
    assert "undecided: margin of all runs" in capsys.readouterr().out


def test_a_baseline_file_says_what_its_runs_say(folder: Path) -> None:
    file = folder / "base.json"
    assert run(folder, "--baseline", "before", "--record", str(file)) == 0
    for candidate in ("same", "worse"):
        of_runs, of_file = (check(Check(str(one), [str(folder / candidate)]))[0] for one in (folder / "before", file))
        assert [(each.gate, each.word, each.value) for each in of_runs.verdicts] == [
            (each.gate, each.word, each.value) for each in of_file.verdicts
        ]
    assert run(folder, "--baseline", str(file), "--candidate", "same", "--config", "gate.yaml") == 0


def test_a_baseline_file_of_another_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folders(folder / "elsewhere", environment={**MACHINE, "processor": "aarch64", "torch": "2.16.0"})
    file = str(folder / "base.json")
    assert run(folder, "--baseline", "elsewhere", "--record", file) == 0
    (folder / "lossless.yaml").write_text("gates: {lossless: true}\n")
    assert run(folder, "--baseline", file, "--candidate", "same", "--config", "lossless.yaml") == 0
    shown = capsys.readouterr().out
    assert "lossless        inconclusive" in shown
    assert "the machines differ in processor" in shown
    assert "tolerance       passes" in shown
    assert run(folder, "--baseline", file, "--candidate", "same", "--config", "gate.yaml") == 2  # there it must decide


def test_runs_whose_scores_are_no_shares_are_judged_alone(folder: Path) -> None:
    for name, logprob in (("before", -1.0), ("same", -3.0)):
        windows = [Answer(logprobs=(logprob - 0.01 * number, -1.0)) for number in range(30)]
        Suite(folder / name, BASE, {"environment": MACHINE}).run("ppl", windows, method="language_modeling", groups=("ppl",))
    (found,) = check(Check(str(folder / "before"), [str(folder / "same")]))
    alone = {each.gate: each.word for each in found.verdicts if each.subject == "ppl"}
    assert (alone["logprob"], found.status) == ("fails", 1)


REFUSED: Sequence[tuple[Sequence[str], str]] = (
    (["--baseline", "before"], "nothing to do"),
    (["--baseline", "nowhere", "--candidate", "same"], "no suite `nowhere`"),
    (["--baseline", "before", "--candidate", "before:other"], "has no runs"),
    (["--baseline", "before", "--candidate", "same", "same"], "is given twice"),
    (["--baseline", "before", "--candidate", "other_model"], "is another model than"),
    (["--baseline", "before", "--candidate", "other_prompts"], "was asked something else"),
    (["--baseline", "before", "--candidate", "fewer"], "has no run `hellaswag`"),
    (["--baseline", "before", "--candidate", "torn"], "is not whole"),
    (["--baseline", "before", "--candidate", "halfway"], "did not end"),
    (["--baseline", "before", "--candidate", "broken.json"], "cannot be read as a baseline file"),
    (["--baseline", "before", "--candidate", "same", "--config", "bad.yaml"], "unknown key `gate`"),
    (["--baseline", "before", "--candidate", "same", "--fidelity", "broken.json"], "cannot be read as a result of fidelity"),
)


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_bad_input_is_one_line(folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    named = " ".join(words)
    if "other_model" in named:
        run_folders(folder / "other_model", numerics={"weights": {"digest": "ffff"}})
    if "other_prompts" in named:
        run_folders(folder / "other_prompts", answers=[Answer(prompt="Other: {instance}") for _ in range(20)])
    if "fewer" in named:
        Suite(folder / "fewer", BASE).run("mmlu:subject=a", [Answer()] * 20)
    for name, file in (("torn", "scenario_state.json"), ("halfway", "per_instance_stats.json")):
        if name in named:
            place = next(run_folders(folder / name).glob(f"mmlu*/{file}"))
            place.write_text(place.read_text()[:100]) if name == "torn" else place.unlink()
    (folder / "broken.json").write_text("{")
    (folder / "bad.yaml").write_text("gate: {}")
    assert run(folder, *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("reading ")]
    assert line.startswith("flexgen-helm: ")
    assert message in line


def test_a_suite_stands_for_all_its_models_but_the_baseline(folder: Path) -> None:
    run_folders(folder / "before", W4, scheme="w4")
    found = check(Check(f"{folder / 'before'}:{BASE}", [str(folder / "before")]))
    assert [each.candidate for each in found] == ["@w4"]
