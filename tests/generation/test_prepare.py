"""Every way in which a job can be wrong, and the BOS rule."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerBase, XGLMTokenizer

from flexgen_helm.errors import InvalidJob
from flexgen_helm.generation.prepare import PreparedJob, prepare
from flexgen_helm.types import Completion, Job, Policy, Result, TokenLogprob
from tests import tiny_tokenizers

PLAIN = tiny_tokenizers.byte_level()
ADDS_BOS = {
    "byte_level": tiny_tokenizers.byte_level(adds_bos=True),
    "metaspace": tiny_tokenizers.metaspace_bpe(adds_bos=True),
}
BOS = 1
CONTEXT = 64


def prepared(job: Job, tokenizer: PreTrainedTokenizerBase | None = PLAIN) -> PreparedJob:
    return prepare(job, tokenizer=tokenizer, max_length=CONTEXT, vocab_size=len(tokenizer or PLAIN))


INVALID = {
    "nothing to continue": (Job(), "none of them"),
    "both": (Job(prompt="a", token_ids=[5]), "prompt and token_ids"),
    "empty prompt": (Job(prompt=""), "prompt is empty"),
    "prompt of another type": (Job(prompt=b"a"), "type bytes"),  # type: ignore[arg-type]
    "no token ids": (Job(token_ids=[]), "token_ids are empty"),
    "token ids are text": (Job(token_ids="12"), "no integer"),  # type: ignore[arg-type]
    "token ids are floats": (Job(token_ids=[1.0]), "no integer"),  # type: ignore[list-item]
    "token ids are one number": (Job(token_ids=7), "no integer"),  # type: ignore[arg-type]
    "negative token id": (Job(token_ids=[-1]), "token id -1"),
    "token id behind the last": (Job(token_ids=[3, len(PLAIN)]), f"token id {len(PLAIN)}.*0 to {len(PLAIN) - 1}"),
    "prompt behind the context": (Job(token_ids=[5] * 65, max_new_tokens=1), "65 tokens.*context holds 64"),
    "new tokens behind the context": (Job(token_ids=[5] * 60, max_new_tokens=5), "together 65.*context holds 64"),
    "negative max_new_tokens": (Job(prompt="a", max_new_tokens=-1), "max_new_tokens must be .*not -1"),
    "max_new_tokens of another type": (Job(prompt="a", max_new_tokens=1.5), "max_new_tokens must be .*not 1.5"),  # type: ignore[arg-type]
    "max_new_tokens is a bool": (Job(prompt="a", max_new_tokens=True), "max_new_tokens must be .*not True"),
    "more completions than can be counted": (Job(prompt="a", num_completions=10**9), "num_completions is 1000000000"),
    "no completion": (Job(prompt="a", num_completions=0), "num_completions must be .*not 0"),
    "temperature NaN": (Job(prompt="a", temperature=math.nan), "temperature must be .*not nan"),
    "temperature infinite": (Job(prompt="a", temperature=math.inf), "temperature must be .*not inf"),
    "temperature negative": (Job(prompt="a", temperature=-0.5), "temperature must be .*not -0.5"),
    "temperature None": (Job(prompt="a", temperature=None), "temperature must be .*not None"),  # type: ignore[arg-type]
    "temperature beyond every float": (Job(prompt="a", temperature=10**400), "temperature must be .*not 1000"),
    "top_p zero": (Job(prompt="a", top_p=0.0), "top_p must be .*not 0.0"),
    "top_p above one": (Job(prompt="a", top_p=1.01), "top_p must be .*not 1.01"),
    "top_p NaN": (Job(prompt="a", top_p=math.nan), "top_p must be .*not nan"),
    "negative top_logprobs": (Job(prompt="a", top_logprobs=-1), "top_logprobs must be .*not -1"),
    "more top_logprobs than tokens": (
        Job(prompt="a", top_logprobs=10_000),
        f"top_logprobs is 10000.*{len(PLAIN)} tokens",
    ),
    "stop is a string": (Job(prompt="a", stop="\n"), r"stop is '\\n'"),  # type: ignore[arg-type]
    "stop is empty": (Job(prompt="a", stop=("a", "")), "none of them empty"),
    "stop holds None": (Job(prompt="a", stop=(None,)), "must be a tuple of strings"),  # type: ignore[arg-type]
    "stop is None": (Job(prompt="a", stop=None), "stop is None"),  # type: ignore[arg-type]
    "seed is text": (Job(prompt="a", seed="1"), "seed must be .*not '1'"),  # type: ignore[arg-type]
    "nothing asked": (Job(prompt="a", max_new_tokens=0), "nothing is asked"),
    "candidates of prompt tokens": (
        Job(prompt="a", score_prompt=True, top_logprobs=2),
        "top_logprobs is 2 and max_new_tokens is 0.*only generated tokens have.*max_new_tokens=1",
    ),
    "half a surrogate pair": (Job(prompt="ab\ud800"), "position 2"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_jobs_say_what_is_wrong(name: str) -> None:
    job, message = INVALID[name]
    with pytest.raises(InvalidJob, match=message):
        prepared(job)


def test_a_prompt_or_stop_without_a_tokenizer_is_invalid() -> None:
    with pytest.raises(InvalidJob, match=r"no tokenizer.*Give token_ids"):
        prepared(Job(prompt="a"), tokenizer=None)
    with pytest.raises(InvalidJob, match="no tokenizer"):
        prepared(Job(token_ids=[5], stop=("a",)), tokenizer=None)
    assert prepared(Job(token_ids=[5]), tokenizer=None).input_ids == (5,)


def test_limits_that_just_fit_are_valid() -> None:
    assert len(prepared(Job(token_ids=[5] * 60, max_new_tokens=4)).input_ids) == 60
    assert len(prepared(Job(token_ids=[5] * 64, max_new_tokens=0, score_prompt=True)).input_ids) == 64
    assert prepared(Job(prompt="a", top_logprobs=len(PLAIN))).job.top_logprobs == len(PLAIN)


def test_a_tokenizer_of_another_model_is_noticed() -> None:
    with pytest.raises(InvalidJob, match="The tokenizer gave token id"):
        prepare(Job(prompt="hello"), tokenizer=PLAIN, max_length=CONTEXT, vocab_size=10)


def test_scoring_alone_generates_nothing() -> None:
    assert Job(prompt="a").max_new_tokens == 16
    assert Job(prompt="a", score_prompt=True).max_new_tokens == 0
    assert Job(prompt="a", score_prompt=True, max_new_tokens=3).max_new_tokens == 3
    assert prepared(Job(token_ids=[5] * CONTEXT, score_prompt=True)).job.max_new_tokens == 0


@pytest.mark.parametrize("cls", [Completion, Job, Policy, Result, TokenLogprob])
def test_help_explains_every_field(cls: Any) -> None:
    names = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else cls._fields
    for name in names:
        assert re.search(rf"^ +{name}: \S.{{10}}", cls.__doc__, flags=re.MULTILINE), name


def test_numpy_numbers_are_numbers() -> None:
    numbers: dict[str, Any] = {
        "token_ids": np.array([5, 6]),
        "max_new_tokens": np.int64(2),
        "temperature": np.float32(0.5),
        "seed": np.int32(1),
    }
    assert prepared(Job(**numbers)).input_ids == (5, 6)


def test_stop_becomes_a_tuple() -> None:
    assert prepared(Job(prompt="a", stop=["\n"])).job.stop == ("\n",)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ADDS_BOS)
def test_bos_is_added_where_the_tokenizer_adds_it(name: str) -> None:
    tokenizer = ADDS_BOS[name]
    result = prepared(Job(prompt="The fox"), tokenizer)
    assert list(result.input_ids) == tokenizer("The fox")["input_ids"]
    assert result.input_ids[0] == BOS
    assert list(result.prompt_ids) == tokenizer("The fox", add_special_tokens=False)["input_ids"]
    assert result.num_added == 1


def test_bos_is_not_added_twice() -> None:
    result = prepared(Job(prompt="<s>The fox"), ADDS_BOS["byte_level"])
    assert result.num_added == 0
    assert list(result.input_ids).count(BOS) == 1
    assert result.prompt_ids == result.input_ids


def test_bos_is_not_added_where_the_tokenizer_adds_none() -> None:
    assert PLAIN.bos_token_id == BOS
    result = prepared(Job(prompt="The fox"))
    assert list(result.input_ids) == PLAIN("The fox")["input_ids"]
    assert result.num_added == 0


def test_a_tokenizer_is_asked_once_for_its_bos_and_another_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, asked = tiny_tokenizers.byte_level(adds_bos=True), []
    encode = tokenizer.encode

    def count(text: str, **options: Any) -> Any:
        asked.append(text)
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", count)
    jobs = [Job(prompt=prompt) for prompt in ("one", "two", "three")]
    assert [prepared(job, tokenizer).num_added for job in jobs] == [1, 1, 1]
    assert asked == ["one", "x", "x", "two", "three"]
    assert [prepared(jobs[0], other).num_added for other in (PLAIN, tokenizer, PLAIN)] == [0, 1, 0]


def surrounded(template: str) -> PreTrainedTokenizerBase:
    """A tokenizer that puts tokens around every text."""
    tokenizer: Any = tiny_tokenizers.byte_level()
    special = [(token, number) for number, token in enumerate(tiny_tokenizers.SPECIAL)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    return tokenizer  # type: ignore[no-any-return]


@pytest.mark.parametrize("prefix", ["<|im_end|> <s>", "</s>", "<s> <s> </s>"])
def test_any_prefix_is_added_as_the_tokenizer_adds_it(prefix: str) -> None:
    tokenizer = surrounded(f"{prefix} $A")
    result = prepared(Job(prompt="The fox"), tokenizer)
    assert list(result.input_ids) == tokenizer("The fox")["input_ids"]
    assert list(result.prompt_ids) == tokenizer("The fox", add_special_tokens=False)["input_ids"]
    assert result.num_added == len(prefix.split())
    # All of it must be there, else all of it is added.
    begun = prepared(Job(prompt=prefix.replace(" ", "") + "The fox"), tokenizer)
    assert (begun.input_ids, begun.num_added) == (result.input_ids, 0)
    partly = prepared(Job(prompt=prefix.split()[-1] + "The fox"), tokenizer)
    assert partly.num_added == (len(prefix.split()) if " " in prefix else 0)


def test_what_a_tokenizer_puts_behind_a_text_is_left_out() -> None:
    """A text that has ended is not what a prompt is; the tokens before it are added all the same."""
    tokenizer = surrounded("<s> $A </s>")
    assert tokenizer("The fox")["input_ids"][-1] == 2
    result = prepared(Job(prompt="The fox"), tokenizer)
    assert list(result.input_ids) == tokenizer("The fox")["input_ids"][:-1]
    assert prepared(Job(prompt="The fox"), surrounded("$A </s>")).input_ids == result.prompt_ids


def test_a_prefix_is_added_whole_or_not_at_all() -> None:
    tokenizer = surrounded("<|im_end|> <s> $A")
    ids = tokenizer("The fox", add_special_tokens=False)["input_ids"]
    job, room = Job(prompt="The fox", max_new_tokens=3), {"tokenizer": tokenizer, "vocab_size": len(tokenizer)}
    added = [prepare(job, max_length=len(ids) + 3 + left, **room).num_added for left in range(3)]  # type: ignore[arg-type]
    assert added == [0, 0, 2]


def test_a_prefix_that_the_model_does_not_know_is_named() -> None:
    with pytest.raises(InvalidJob, match="The tokenizer gave token id 3, but"):
        prepare(Job(prompt="<s>"), tokenizer=surrounded("<|im_end|> $A"), max_length=CONTEXT, vocab_size=3)


def test_the_prefix_of_a_class_of_transformers_is_found() -> None:
    vocab = [*((token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")), *((piece, -1.0) for piece in ("\u2581", "a", "b"))]
    tokenizer = XGLMTokenizer(vocab=vocab)
    result = prepared(Job(prompt="a b"), tokenizer)
    assert list(result.input_ids) == tokenizer("a b")["input_ids"]
    assert (result.input_ids[0], result.num_added) == (tokenizer.eos_token_id, 1)


def test_token_ids_are_taken_as_they_are() -> None:
    result = prepared(Job(token_ids=[5, 6]), ADDS_BOS["byte_level"])
    assert (result.input_ids, result.num_added) == ((5, 6), 0)


def test_bos_is_left_out_where_there_is_no_room() -> None:
    tokenizer = ADDS_BOS["byte_level"]
    ids = tokenizer("The fox", add_special_tokens=False)["input_ids"]
    job = Job(prompt="The fox", max_new_tokens=3)
    room: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": len(tokenizer)}
    assert prepare(job, max_length=len(ids) + 4, **room).num_added == 1
    assert prepare(job, max_length=len(ids) + 3, **room).num_added == 0
    with pytest.raises(InvalidJob, match="context holds"):
        prepare(job, max_length=len(ids) + 2, **room)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=60))
def test_any_text_is_tokenised_or_refused(prompt: str) -> None:
    try:
        ids = prepare(Job(prompt=prompt), tokenizer=PLAIN, max_length=1000, vocab_size=len(PLAIN)).prompt_ids
    except InvalidJob:
        with pytest.raises(UnicodeEncodeError):
            prompt.encode()
    else:
        assert PLAIN.decode(list(ids)) == prompt
