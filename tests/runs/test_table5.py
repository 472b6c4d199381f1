"""Prompts, figures against transformers and plain formulas, and the refusal of columns that are equal."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.table5 import __main__ as command
from flexgen_helm.runs.table5 import prompts
from flexgen_helm.runs.table5.columns import Column, Work, answer, check_distinct, compared, figures
from flexgen_helm.runs.table5.prompts import Question, make_questions, make_windows, most_questions
from flexgen_helm.statistics.arrays import Floats
from tests.models import save_tiny
from tests.reference import PROMPT_TOLERANCE, Reference
from tests.tokenizers import save_character_tokenizer

PASSAGES = [f"passage {number} ends in {chr(97 + number % 26)}{number} \n" for number in range(38)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_tiny("llama", tmp_path)
    save_character_tokenizer(folder)
    return folder


def test_a_question_stands_behind_the_whole_passages_of_its_group() -> None:
    questions = make_questions(PASSAGES, most_questions(len(PASSAGES)))
    assert [question.group for question in questions] == [0] * 10 + [1] * 10 + [2] * 3
    assert [question.word for question in questions[10:12]] == ["u20", "v21"]
    *context, asked = questions[11].prompt.split("\n\n")
    assert context == [text.strip() for text in PASSAGES[15:20]]
    assert asked == "passage 21 ends in"


@pytest.mark.parametrize("count", [0, 24])
def test_no_more_questions_are_asked_than_there_are(count: int) -> None:
    with pytest.raises(FlexGenError, match="38 passages give 1 to 23"):
        make_questions(PASSAGES, count)


def test_windows_hold_each_token_once_behind_the_end_token(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "WINDOW", 40)
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = [list(job.token_ids or []) for job in make_windows(tokenizer, "abcdefghij" * 20, 100, 640)]
    assert {window[0] for window in windows} == {tokenizer.eos_token_id}
    assert [token for window in windows for token in window[1:]] == tokenizer.encode("abcdefghij" * 10)
    assert [len(window) for window in windows] == [41, 41, 21]
    assert len(list(make_windows(tokenizer, "abcdefghij" * 20, 100, 30)[0].token_ids or [])) == 30
    with pytest.raises(FlexGenError, match="the text has 1 to 200"):
        make_windows(tokenizer, "abcdefghij" * 20, 201, 640)


def test_answers_are_those_of_transformers(model: Path) -> None:
    judge, tokenizer = Reference(model), AutoTokenizer.from_pretrained(model)
    prompts = [question.prompt for question in make_questions(PASSAGES, 12)]
    greedy = [judge.greedy(tokenizer.encode(prompt), 8) for prompt in prompts]
    # What the model writes before its end token, and for every third question something that it does not.
    written = [[token for token in found.token_ids if token not in judge.end_tokens] for found in greedy]
    words = ["qq" if number % 3 == 0 else str(tokenizer.decode(ids)).strip() for number, ids in enumerate(written)]
    assert all(words)
    questions = [Question(*each, 0) for each in zip(prompts, words, strict=True)]
    text = "What the windows of a text are made of. " * 6
    found = answer(model, None, Work(questions, text, 200))
    assert found.right.tolist() == [float(number % 3 != 0) for number in range(12)]
    for logprobs, wanted in zip(found.answers, greedy, strict=True):
        assert logprobs == pytest.approx(wanted.logprobs, abs=PROMPT_TOLERANCE)
    ids = [tokenizer.eos_token_id, *tokenizer.encode(text)[:200]]
    assert -found.losses == pytest.approx(judge.score(ids)[1:], abs=PROMPT_TOLERANCE)


def test_figures_are_those_of_their_formulas() -> None:
    chance = np.random.default_rng(0)
    plain, other = (
        Column(name, chance.integers(0, 2, 40).astype(float), (), chance.exponential(1, 500), np.arange(40) // 10, 1.0)
        for name in "ab"
    )
    found = figures(other, plain)

    def error(values: Floats, groups: int) -> float:
        """Of a mean over equal groups: that of the groups' means."""
        means = values.reshape(groups, -1).mean(1)
        return float(means.std(ddof=1) / math.sqrt(groups))

    assert (found.accuracy.value, found.accuracy.error) == pytest.approx((other.right.mean(), error(other.right, 4)))
    changes = other.right - plain.right
    assert (found.accuracy_change.value, found.accuracy_change.error) == pytest.approx((changes.mean(), error(changes, 4)))
    perplexity, more = math.exp(other.losses.mean()), other.losses - plain.losses
    assert (found.perplexity.value, found.perplexity.error) == pytest.approx((perplexity, perplexity * error(other.losses, 5)))
    ratio = math.exp(more.mean())
    assert (found.perplexity_ratio.value, found.perplexity_ratio.error) == pytest.approx((ratio, ratio * error(more, 5)))


def test_differences_are_counted_and_equal_columns_are_refused() -> None:
    first = Column("a", np.array([1.0, 0.0]), ((-1.0, -2.0), (-3.0,)), np.array([0.5, 0.25, 1.0]), np.zeros(2, dtype=int), 1.0)
    second = replace(first, name="b", right=np.zeros(2), answers=((-1.0, -2.0), (-4.0,)), losses=np.array([0.5, 0.125, 2.0]))
    assert compared(first, second) == (
        "b against a: log-probabilities of 2 of 3 tokens and of 1 of 2 answers differ, 1 of them in being right"
    )
    check_distinct([first, second])
    with pytest.raises(FlexGenError, match="columns a and c are equal to the last bit on the text"):
        check_distinct([first, second, replace(second, name="c", losses=first.losses)])
    with pytest.raises(FlexGenError, match="columns a and c are equal to the last bit on the last words"):
        check_distinct([first, second, replace(second, name="c", answers=first.answers)])


@pytest.mark.parametrize("tokens", [300, 100])
def test_the_command_prints_columns_that_differ(
    model: Path, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "lambada_passages", lambda: PASSAGES)
    monkeypatch.setattr(command, "recent_addresses", lambda: "Thank you all very much. " * 20)
    file = tmp_path / "x.json"
    options = ["--model", str(model), "--variants", "kv4", "kv4s10", "--num-questions", "12", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["table5", *options, "--tokens", str(tokens)])
    if tokens < 128:
        assert command.main() == 1
        assert "columns 16 bits and kv4 are equal to the last bit on the text" in capsys.readouterr().err
        return
    assert command.main() == 0
    result = json.loads(file.read_text())
    assert [column["name"] for column in result["columns"]] == ["16 bits", "kv4", "kv4s10"]
    assert [text.split(":")[0] for text in result["differences"]] == ["kv4 against 16 bits", "kv4s10 against kv4"]
    # A first token and all others of the first chunk read no compressed K and V.
    assert all("of 300 tokens" in text for text in result["differences"])
    assert "\nkv4s10 " in capsys.readouterr().out
