"""G0: one flipped bit is found, and nothing is decided where bits cannot be expected to be equal; level C where they cannot."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_helm.gate.checking import Check, check
from flexgen_helm.gate.config import parse_config
from flexgen_helm.gate.exact import ENVIRONMENT
from flexgen_helm.gate.verdict import Checked, Verdict
from flexgen_helm.helm.run_record import RUN_FILE
from flexgen_helm.machine.identity import environment
from flexgen_helm.reports.runs import only_run
from tests.gate.made import BASE, MACHINE, W4, One, Pair, engine, run_folders
from tests.helm.conftest import RunSuite
from tests.helm.fakes import run_spec
from tests.reports.synthetic import Answer

LOSSLESS = parse_config({"gates": {"lossless": True}})


@pytest.fixture(autouse=True)
def _no_kept_fidelity(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path_factory.mktemp("cache")))


def next_float(value: float) -> float:
    """Returns a number of which the last bit differs."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    (changed,) = struct.unpack("<d", struct.pack("<q", bits ^ 1))
    return float(changed)


def checked(tmp_path: Path, answers: list[Answer] | None = None, deployment: str = BASE, **record: Any) -> Checked:
    before = run_folders(tmp_path / "before")
    after = run_folders(tmp_path / "after", deployment, answers=answers, **record)
    (found,) = check(Check(str(before), [str(after)], LOSSLESS))
    return found


def verdict(found: Checked, gate: str) -> Verdict:
    (one,) = [each for each in found.verdicts if each.gate == gate]
    return one


def test_equal_bits_pass(tmp_path: Path) -> None:
    found = checked(tmp_path)
    assert verdict(found, "lossless").reason == "all 100 requests returned the same bits"
    assert (verdict(found, "lossless").word, found.status) == ("passes", 0)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_flipped_bit_fails(tmp_path: Path, place: int) -> None:
    logprobs = [-0.5, -1.25, -2.0]
    base = [Answer(score=1.0, logprobs=tuple(logprobs)) for _ in range(20)]
    before = run_folders(tmp_path / "before", answers=base)
    logprobs[place] = next_float(logprobs[place])
    flipped = [*base[:7], replace(base[7], logprobs=tuple(logprobs)), *base[8:]]
    after = run_folders(tmp_path / "after", answers=flipped)
    (found,) = check(Check(str(before), [str(after)], LOSSLESS))
    lossless = verdict(found, "lossless")
    assert (lossless.word, lossless.value, found.status) == ("fails", 1.0, 1)
    assert "1 of 100 requests" in lossless.reason
    assert "instance id7 of mmlu:subject=a" in lossless.reason
    assert verdict(found, "tolerance").word == "passes"


def test_another_text_fails(tmp_path: Path) -> None:
    found = checked(tmp_path, [Answer(score=float(number % 2), text="AB"[number == 3]) for number in range(20)])
    assert "1 other texts" in verdict(found, "lossless").reason
    assert (verdict(found, "tolerance").word, found.status) == ("fails", 1)


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_another_machine_cannot_decide_about_bits(tmp_path: Path, name: str) -> None:
    found = checked(tmp_path, environment={**MACHINE, name: "other"})
    lossless = verdict(found, "lossless")
    assert lossless.word == "inconclusive"
    assert name in lossless.reason
    # Tolerances decide instead.
    assert (verdict(found, "tolerance").word, verdict(found, "tolerance").required, found.status) == ("passes", True, 0)


def test_other_numerics_cannot_decide_about_bits(tmp_path: Path) -> None:
    found = checked(tmp_path, deployment=W4, scheme="w4")
    assert "weights.scheme (plain and w4)" in verdict(found, "lossless").reason


def test_what_is_not_recorded_cannot_decide() -> None:
    ones = [One()] * 3
    for served in (None, engine(environment={}), engine(environment={**MACHINE, "instructions": None}, numerics={})):
        assert Pair(ones, ones, (engine(), served)).judge("lossless").word == "inconclusive"


def test_answers_from_the_cache_prove_nothing() -> None:
    ones = [One()] * 3
    cached = engine(requests={"total": 3, "cached": 3})
    assert "nothing was computed" in Pair(ones, ones, (engine(), cached)).judge("lossless").reason
    partly = Pair(ones, ones, (engine(), engine(requests={"total": 3, "cached": 1}))).judge("lossless")
    assert (partly.word, "1 came from" in partly.reason) == ("passes", True)


def test_missing_answers_cannot_decide() -> None:
    pair = Pair([One()] * 3, [One()] * 2)
    assert pair.judge("lossless").word == "inconclusive"
    assert "1 rows" in pair.judge("lossless").reason


@pytest.mark.parametrize(("text", "limit"), [("A", 1e-4), ("", 3e-4)])
def test_tolerance_of_generated_tokens_and_of_choices(text: str, limit: float) -> None:
    for change, word in ((0.9 * limit, "passes"), (1.1 * limit, "fails")):
        pair = Pair([One(logprob=-1.0, text=text)] * 2, [One(logprob=-1.0 - change, text=text)] * 2)
        assert pair.judge("tolerance").word == word
    assert Pair([One()], [One()]).judge("tolerance").word == "inconclusive"  # no log-probabilities


@pytest.mark.usefixtures("loader")
def test_runs_record_their_machine(run_suite: RunSuite) -> None:
    run = only_run(run_suite([run_spec()]))
    assert (run.folder / RUN_FILE).is_file()
    record = run.record()
    assert record is not None
    assert record["environment"] == environment(torch.device("cpu"))
    assert set(record["environment"]) == set(ENVIRONMENT)
