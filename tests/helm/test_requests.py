"""Every field of a HELM request, and what HELM gets back."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
from helm.common.image_generation_parameters import ImageGenerationParameters
from helm.common.media_object import MediaObject, MultimediaObject
from helm.common.request import Request
from helm.common.response_format import ResponseFormat
from hypothesis import strategies as st

from flexgen_helm.errors import InvalidJob
from flexgen_helm.generation.prepare import prepare
from flexgen_helm.helm.requests import Timing, cache_key, failure, stable_seed, to_job, to_request_result, to_response
from flexgen_helm.types import Completion, Job, Result, TokenLogprob
from tests.helm.fakes import numerics_of

CHAT = [{"role": "user", "content": "Hi"}]
TIMING = Timing(started=1_700_000_000.9, seconds=8.0, batch_size=4)


PIECES = st.text("ab\n#", min_size=1, max_size=3)


def request(**fields: Any) -> Request:
    defaults: dict[str, Any] = {"model": "test/letters", "prompt": "Question", "max_tokens": 5, "temperature": 0.0}
    return Request(**{**defaults, **fields})


def completion(text: str, tokens: list[str], reason: Any = "length", num_text_tokens: int | None = None) -> Completion:
    steps, count = [[TokenLogprob(7, -0.5), TokenLogprob(8, -1.5)]] * len(tokens), len(tokens)
    return Completion(text, list(range(count)), tokens, [-0.25] * count, steps, reason, num_text_tokens or count)


def answer(asked: Request, *completions: Completion) -> Any:
    return to_request_result(to_response(asked, Result(list(completions)), TIMING), cached=False)


def test_generation_becomes_a_job() -> None:
    asked = request(temperature=0.7, top_p=0.9, num_completions=3, stop_sequences=["\n", "###"])
    assert to_job(asked) == Job(
        prompt="Question", max_new_tokens=5, temperature=0.7, top_p=0.9, num_completions=3, stop=("\n", "###")
    )


def test_echo_without_new_tokens_scores_the_prompt() -> None:
    assert to_job(request(max_tokens=0, echo_prompt=True)) == Job(prompt="Question", max_new_tokens=0, score_prompt=True)


def test_messages_become_a_job_without_a_prompt() -> None:
    assert to_job(request(prompt="", messages=CHAT)) == Job(messages=CHAT, max_new_tokens=5)


def test_every_field_of_a_request_is_served_or_refused() -> None:
    """A field that a later HELM adds is to be decided on here, and then in `to_job`."""
    addressing = {"model", "model_deployment"}
    refused = {"embedding", "presence_penalty", "frequency_penalty", "multimodal_prompt"}
    refused |= {"image_generation_parameters", "response_format"}
    served = {"prompt", "messages", "temperature", "num_completions", "top_k_per_token", "max_tokens"}
    served |= {"stop_sequences", "echo_prompt", "top_p", "random"}
    assert {field.name for field in fields(Request)} == addressing | refused | served


def test_top_k_per_token_asks_for_candidates_and_leaves_sampling_alone() -> None:
    job = to_job(request(top_k_per_token=5, temperature=1.0))
    assert (job.top_logprobs, job.temperature, job.top_p) == (5, 1.0, 1.0)
    assert to_job(request(top_k_per_token=1)).top_logprobs == 0
    assert to_job(request(top_k_per_token=5, max_tokens=0, echo_prompt=True)).top_logprobs == 0


def test_seed_is_the_same_in_every_process_and_differs_between_strings() -> None:
    code = "from flexgen_helm.helm.requests import stable_seed; print(stable_seed('trial 1'))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert stable_seed("trial 1") == int(output.split()[-1])
    seeds = {stable_seed(str(number)) for number in range(1000)}
    assert len(seeds) == 1000
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert to_job(request(random="3")).seed == stable_seed("3")
    assert to_job(request(random=None)).seed is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"embedding": True}, "`embedding`"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "`messages` beside a `prompt`"),
        ({"prompt": "", "messages": CHAT, "max_tokens": 0, "echo_prompt": True}, "`echo_prompt` with `messages`"),
        (
            {
                "prompt": "",
                "multimodal_prompt": MultimediaObject([MediaObject(text="Hi", content_type="text/plain")]),
            },
            "multimodal",
        ),
        ({"response_format": ResponseFormat(json_schema={})}, "`response_format`"),
        ({"presence_penalty": 0.5}, "`presence_penalty`"),
        ({"frequency_penalty": -0.5}, "`frequency_penalty`"),
        ({"echo_prompt": True, "max_tokens": 3}, "`echo_prompt` with `max_tokens`"),
        ({"prompt": "", "image_generation_parameters": ImageGenerationParameters()}, "multimodal"),
        ({"max_tokens": 0}, "`max_tokens=0` without `echo_prompt`"),
        ({"max_tokens": "5"}, "`max_tokens` of this request is of type str"),
        ({"temperature": None}, "`temperature` of this request is of type NoneType"),
        ({"stop_sequences": "\n"}, "`stop_sequences` of this request is of type str"),
        ({"random": 3}, "`random` of this request is of type int"),
        ({"echo_prompt": "False"}, "`echo_prompt` of this request is of type str"),
        ({"embedding": "False"}, "`embedding` of this request is of type str"),
        ({"prompt": b"Hi"}, "`prompt` of this request is of type bytes"),
        ({"top_k_per_token": True}, "`top_k_per_token` of this request is of type bool"),
        ({"temperature": 10**400}, "`temperature` of this request is an integer of 1329 bits"),
        ({"max_tokens": 10**5000}, "`max_tokens` of this request is an integer of 16610 bits"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidJob, match=named):
        to_job(request(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be .*not -1"),
        ({"top_k_per_token": 10**6}, "top_k_per_token is 1000000, but"),
        ({"num_completions": 5000}, "num_completions is 5000, .* several requests that differ in `random`"),
    ],
)
def test_what_the_engine_refuses_has_the_names_of_helm(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        prepare(to_job(request(**fields)), tokenizer=None, max_length=100, vocab_size=100)
    assert re.match(f"InvalidJob: {message}", failure(refused.value).error or "")


def test_completion_has_the_fields_that_metrics_read() -> None:
    result = answer(request(), completion("ab", ["a", "b"]))
    (output,) = result.completions
    assert (output.text, output.logprob, output.finish_reason) == ("ab", -0.5, {"reason": "length"})
    assert [(token.text, token.logprob) for token in output.tokens] == [("a", -0.25), ("b", -0.25)]
    assert (result.success, result.cached, result.embedding, result.error) == (True, False, [], None)
    assert (result.request_datetime, result.batch_size, result.batch_request_time) == (1_700_000_000, 4, 8.0)
    assert result.request_time == 2.0


def test_tokens_without_a_part_in_the_text_are_not_shown() -> None:
    (output,) = answer(request(stop_sequences=["\n"]), completion(" a", [" a", "\n"], "stop", 1)).completions
    assert (output.text, [token.text for token in output.tokens]) == (" a", [" a"])
    assert (output.logprob, output.finish_reason) == (-0.25, {"reason": "stop"})


def test_end_token_is_not_shown() -> None:
    (output,) = answer(request(), completion("a", ["a", "<|end|>"], "endoftext", 1)).completions
    assert (output.text, [token.text for token in output.tokens]) == ("a", ["a"])
    assert output.finish_reason == {"reason": "endoftext"}


def test_every_completion_is_returned_in_order() -> None:
    result = answer(request(num_completions=2), completion("a", ["a"]), completion("b", ["b"]))
    assert [output.text for output in result.completions] == ["a", "b"]


def test_scored_prompt_has_exactly_its_own_tokens() -> None:
    asked = request(prompt="Why not", max_tokens=0, echo_prompt=True, stop_sequences=["\n"])
    scored = Result(prompt_token_ids=[3, 4], prompt_token_texts=["Why", " not"], prompt_logprobs=[0.0, -2.5])
    (output,) = to_request_result(to_response(asked, scored, TIMING), cached=True).completions
    assert (output.text, output.logprob) == ("Why not", -2.5)
    assert [(token.text, token.logprob) for token in output.tokens] == [("Why", 0.0), (" not", -2.5)]


def test_refused_job_is_raised() -> None:
    with pytest.raises(InvalidJob, match="too long"):
        to_response(request(), Result(error=InvalidJob("too long")), TIMING)


def test_candidates_are_kept_in_the_cache() -> None:
    response = to_response(request(top_k_per_token=2), Result([completion("a", ["a"])]), TIMING)
    assert response["completions"][0]["top_logprobs"] == [[(7, -0.5), (8, -1.5)]]


def test_cache_key_holds_numerics_and_all_that_changes_an_answer() -> None:
    base = request(stop_sequences=["\n"])
    numerics = numerics_of("aa")
    others = [
        replace(base, prompt="Other"),
        replace(base, max_tokens=6),
        replace(base, temperature=0.5),
        replace(base, top_p=0.5),
        replace(base, num_completions=2),
        replace(base, random="1"),
        replace(base, stop_sequences=[]),
        replace(base, max_tokens=0, echo_prompt=True),
        replace(base, top_k_per_token=5),
        replace(base, prompt="", messages=CHAT),
        replace(base, prompt="", messages=[*CHAT, {"role": "assistant", "content": "Hi"}]),
    ]
    keys = [cache_key(asked, to_job(asked), numerics) for asked in (base, *others)]
    keys.append(cache_key(base, to_job(base), numerics_of("bb")))
    keys.append(cache_key(base, to_job(base), replace(numerics, rows=replace(numerics.rows, gpu_batch_size=16))))
    assert all(keys[i] != keys[j] for i in range(len(keys)) for j in range(i))
    assert cache_key(base, to_job(base), numerics_of("aa")) == keys[0]


def test_a_message_has_helms_words_for_fields_and_leaves_everything_else() -> None:
    told = failure(InvalidJob("{max_new_tokens} is {count} in {folder}", count=7, folder="/data/top_logprobs/max_new_tokens"))
    assert told.error == "InvalidJob: max_tokens is 7 in /data/top_logprobs/max_new_tokens"
    plain = failure(InvalidJob("The folder /data/{max_new_tokens}/top_logprobs has no tokenizer"))
    assert plain.error == "InvalidJob: The folder /data/{max_new_tokens}/top_logprobs has no tokenizer"
