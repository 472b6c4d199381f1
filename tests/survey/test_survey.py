"""The survey says what is true of the models, and would say it if it were worse."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm import Engine, Job
from flexgen_helm.rows import packed_check
from flexgen_helm.types import Result
from tests.survey import judge as judging
from tests.survey import table
from tests.survey.__main__ import PAGE, all_names, main
from tests.survey.judge import Verdict, judge
from tests.survey.processes import judge_all

SHORT_FORM = (
    *("llama+yarn", "phi3+longrope", "gemma2+low softcaps", "llama4_text", "qwen3_moe", "deepseek_v3", "gpt2"),
    *("falcon", "bloom", "falcon_h1"),
    *("bart", "roberta"),
)
"""Packed, single and refused: by config and by self-check."""


def exit_hard(name: str) -> Verdict:
    os._exit(3)


def abort(name: str) -> Verdict:
    os.abort()


def sleep(name: str) -> Verdict:
    time.sleep(60)
    return Verdict(name, "packed")


def echo(name: str) -> Verdict:
    return Verdict(name, "packed", name)


@pytest.mark.parametrize(
    ("work", "remark"),
    [(exit_hard, "ended with exit status 3 and no verdict"), (abort, "ended by SIGABRT"), (sleep, "time limit of 1 s")],
)
def test_a_process_without_a_verdict_is_a_crash(work: Any, remark: str) -> None:
    (verdict,) = judge_all(["llama"], jobs=1, timeout=1.0 if work is sleep else 60.0, work=work)
    assert (verdict.name, verdict.outcome, verdict.remark) == ("llama", "crashed", remark)


def test_every_name_gets_its_verdict() -> None:
    verdicts = list(judge_all(["a", "b", "c", "d", "e"], jobs=2, timeout=60.0, work=echo))
    assert sorted((verdict.name, verdict.remark) for verdict in verdicts) == [(name, name) for name in "abcde"]


def test_an_engine_that_is_slightly_off_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Engine.run

    def off(engine: Engine, jobs: list[Job]) -> list[Result]:
        results = run(engine, jobs)
        logprobs = results[0].completions[0].logprobs
        completion = replace(results[0].completions[0], logprobs=[logprobs[0] + 2e-4, *logprobs[1:]])
        return [replace(results[0], completions=[completion]), *results[1:]]

    assert judge("llama").outcome == "packed"
    monkeypatch.setattr(Engine, "run", off)
    verdict = judge("llama")
    assert verdict.outcome == "wrong"
    assert "differ by 2.0e-04" in verdict.remark


def test_a_model_that_the_engine_should_have_refused_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoBERTa counts positions from elsewhere, which only the self-check at load sees."""
    assert judge("roberta").outcome == "refused"
    monkeypatch.setattr(packed_check, "TOLERANCE", math.inf)
    assert judge("roberta").outcome == "wrong"


def test_an_exception_of_the_engine_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(Engine, "run", fail)
    verdict = judge("llama")
    assert (verdict.outcome, verdict.remark) == ("crashed", "RuntimeError: out of luck")


def test_jobs_are_ragged_and_half_of_them_share_a_prefix() -> None:
    prompts = [list(job.token_ids or ()) for job in judging.survey_jobs()]
    shared = [ids for ids in prompts if ids[: judging.SHARED_PREFIX] == prompts[-2][: judging.SHARED_PREFIX]]
    assert (len(prompts), len(shared)) == (14, 7)
    assert sorted(map(len, prompts)) == sorted(judging.LENGTHS)


def test_page_is_read_as_it_is_written(tmp_path: Path) -> None:
    verdicts = [Verdict("llama+yarn", "packed"), Verdict("llama", "single", "a | b"), Verdict("bart", "refused", "because")]
    (tmp_path / "page.md").write_text(table.render(verdicts))
    assert list(table.read(tmp_path / "page.md").items()) == [
        ("bart", "refused"),
        ("llama", "single"),
        ("llama+yarn", "packed"),
    ]


def test_unknown_type_is_an_error_that_names_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lama"])
    assert "did you mean llama" in capsys.readouterr().err


def test_all_types_and_enough_variants_are_listed() -> None:
    variants = [name for name in all_names() if "+" in name]
    assert len(variants) >= 20
    assert len(all_names()) - len(variants) >= 150


@pytest.mark.slow
def test_short_form_agrees_with_the_page() -> None:
    stated = table.read(PAGE)
    verdicts = list(judge_all(SHORT_FORM, jobs=os.cpu_count() or 1, timeout=120.0))
    assert {verdict.name: verdict.outcome for verdict in verdicts} == {name: stated[name] for name in SHORT_FORM}, verdicts
    assert {verdict.outcome for verdict in verdicts} == {"packed", "single", "refused"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_types_agree_with_the_page() -> None:
    verdicts = list(judge_all(all_names(), jobs=os.cpu_count() or 1, timeout=120.0))
    assert not [verdict for verdict in verdicts if verdict.outcome in ("wrong", "crashed")]
    assert {verdict.name: verdict.outcome for verdict in verdicts} == table.read(PAGE)
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    assert outcomes["packed"] >= 110
    assert outcomes["packed"] + outcomes["single"] >= 165
