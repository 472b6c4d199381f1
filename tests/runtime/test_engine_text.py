"""Prompts and answers as text: BOS, stop strings, token texts, end tokens."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_helm import Engine, Job
from tests.jobs import FIRST_TOKEN, random_tokens
from tests.models import ENDING
from tests.tokenizers import BOS, save_pair_tokenizer, text_of
from tests.workbench import POLICY, Workbench

IDS = random_tokens(101, 15)
PROMPT = text_of(IDS)
JOB = Job(prompt=PROMPT, max_new_tokens=12, score_prompt=True)


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no-bos"])
def adds_bos(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=["qwen3", "nemotron_h"])
def family(request: pytest.FixtureRequest) -> str:
    """One of packed rows and one of single rows."""
    return str(request.param)


@pytest.fixture(scope="module")
def engine(bench: Workbench, family: str, adds_bos: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = Path(shutil.copytree(bench.folder(family), tmp_path_factory.mktemp("text") / "model"))
    save_pair_tokenizer(folder, adds_bos=adds_bos)
    with Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY) as engine:
        yield engine


def test_bos_is_in_the_input_and_not_in_the_result(engine: Engine, adds_bos: bool) -> None:
    result = engine.run([JOB])[0]
    by_ids = engine.run([replace(JOB, prompt=None, token_ids=[BOS, *IDS] if adds_bos else IDS)])[0]
    assert result.completions == by_ids.completions
    assert result.prompt_token_ids == IDS
    assert result.prompt_token_texts == [text_of([token]) for token in IDS]
    assert by_ids.prompt_logprobs is not None
    assert result.prompt_logprobs == by_ids.prompt_logprobs[-len(IDS) :]
    assert by_ids.prompt_logprobs[0] == 0.0


def test_bos_is_not_doubled(engine: Engine) -> None:
    text, ids = engine.run([replace(JOB, prompt="<s>" + PROMPT), replace(JOB, prompt=None, token_ids=[BOS, *IDS])])
    assert text == ids
    assert text.prompt_token_ids == [BOS, *IDS]


def test_text_and_token_texts(engine: Engine) -> None:
    completion = engine.run([JOB])[0].completions[0]
    assert completion.finish_reason == "length"
    assert completion.text == text_of(completion.token_ids)
    assert completion.token_texts == [text_of([token]) for token in completion.token_ids]


@pytest.mark.parametrize(("first", "last"), [(0, 1), (0, 4), (5, 6), (5, 8), (6, 13), (23, 24), (4, 24)])
def test_stop_string_anywhere_in_the_text(engine: Engine, first: int, last: int) -> None:
    """Stops that begin or end within a token, in the first and in the last one, and longer than several."""
    whole = engine.run([JOB])[0].completions[0]
    stop = whole.text[first:last]
    begin = whole.text.index(stop)
    kept = begin // 2 + 1
    for stops in [(stop,), ("zz", stop), (stop, whole.text[last:] or "zz")]:
        completion = engine.run([replace(JOB, stop=stops)])[0].completions[0]
        assert completion.finish_reason == "stop"
        assert completion.text == whole.text[:begin]
        assert completion.token_ids == whole.token_ids[:kept]
        assert completion.token_texts == whole.token_texts[:kept]
        assert completion.logprobs == whole.logprobs[:kept]
        assert len(completion.top_logprobs) == kept


def test_stop_that_does_not_appear_or_stands_in_the_prompt(engine: Engine) -> None:
    whole = engine.run([JOB])[0].completions[0]
    stop = next(PROMPT[at : at + 4] for at in range(20) if PROMPT[at : at + 4] not in whole.text)
    assert engine.run([replace(JOB, stop=(stop, "0"))])[0].completions[0] == whole


@pytest.mark.parametrize("family", ENDING)
def test_end_token_is_kept_among_the_tokens_and_not_in_the_text(bench: Workbench, family: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bench.folder(family), tmp_path / "model"))
    save_pair_tokenizer(folder, adds_bos=False)
    ends = bench.reference(family).end_tokens
    jobs = [Job(prompt=text_of(random_tokens(seed, 9)), max_new_tokens=12) for seed in range(16)]
    with Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY) as engine:
        completions = [result.completions[0] for result in engine.run(jobs)]
    ended = [completion for completion in completions if completion.finish_reason == "endoftext"]
    # Special tokens within the text may be left out of it, so these say nothing here.
    ended = [completion for completion in ended if min(completion.token_ids) >= FIRST_TOKEN]
    assert ended
    for completion in ended:
        assert completion.token_ids[-1] in ends
        assert not ends.intersection(completion.token_ids[:-1])
        assert completion.text == text_of(completion.token_ids[:-1])
