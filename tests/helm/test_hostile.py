"""Requests that no one should send: each ends as `KINDS` says, at once, by client and by runner, and the engine goes on."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
from helm.clients.auto_client import AutoClient
from helm.common.cache_backend_config import SqliteCacheBackendConfig
from helm.common.image_generation_parameters import ImageGenerationParameters
from helm.common.media_object import MediaObject, MultimediaObject
from helm.common.request import Request, RequestResult
from helm.common.response_format import ResponseFormat

from flexgen_helm.helm.console import Console
from flexgen_helm.helm.deployment import CLIENT
from flexgen_helm.helm.journal import Journal
from flexgen_helm.helm.registry import ENGINES
from flexgen_helm.helm.workload import EngineServer, serve
from tests.text_models import CHATML, save_llama
from tests.tiny_tokenizers import byte_level

CONTEXT = 2048
BEYOND = "<beyond>"
"""A token of the tokenizer that the model does not know."""
CHAT = [{"role": "user", "content": "Hi"}]
IMAGE = MultimediaObject([MediaObject(text="Hi", content_type="text/plain")])
THREADS = 8

Fields = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """Requests of one kind and how each of them ends."""

    variants: list[Fields]
    """What is unusual; the rest of a request is ordinary."""
    refusal: str = ""
    """What the error says; empty: the request is answered."""


def words(count: int) -> str:
    """Returns a text of ``count`` tokens."""
    return "0" * count


KINDS: dict[str, Kind] = {
    "ordinary": Kind([{}, {"temperature": 1.0}, {"max_tokens": 0, "echo_prompt": True}, {"top_k_per_token": 5}]),
    # Prompts
    "empty prompt": Kind([{"prompt": ""}, {"prompt": "", "max_tokens": 0, "echo_prompt": True}], "prompt is empty"),
    "only whitespace": Kind([{"prompt": text} for text in (" ", "\n\n\n", "\t", "\u3000\u00a0", " " * 300)]),
    "half of a surrogate pair": Kind(
        [{"prompt": text} for text in ("\ud800", "a\udfffb", "😀"[:1] + "\ude00")], "half of a surrogate"
    ),
    "special tokens as text": Kind(
        [{"prompt": text} for text in ("<s>", "</s>", "<s><s>Hi", "<|im_end|>" * 40, "a</s>b<unk>")]
    ),
    "a scored prompt that is only BOS": Kind([{"prompt": "<s>", "max_tokens": 0, "echo_prompt": True}]),
    "10,000 tokens": Kind([{"prompt": words(10_000)}, {"prompt": "word " * 5000}], "context holds 2048"),
    "a very long word": Kind([{"prompt": "Donaudampfschifffahrt" * 40}, {"prompt": "x" * 900}]),
    "exactly the context": Kind([{"prompt": words(CONTEXT), "max_tokens": 0, "echo_prompt": True}]),
    "one token more": Kind(
        [{"prompt": words(CONTEXT + 1), "max_tokens": 0, "echo_prompt": True}, {"prompt": words(CONTEXT), "max_tokens": 1}],
        "context holds 2048",
    ),
    "control characters": Kind([{"prompt": text} for text in ("a\0b", "\0" * 50, "\x1b[31m", "\ufeff\uffff\ufffd")]),
    "right to left": Kind([{"prompt": text} for text in ("שלום עולם", "مرحبا \u202eabc", "\u200f" * 9)]),
    "parts of characters": Kind([{"prompt": text} for text in ("👩\u200d", "\u200d👧", "\ufe0f", "e\u0301\u0301\u0301", "🇩")]),
    "a token unknown to the model": Kind([{"prompt": f"a {BEYOND}"}], "The tokenizer gave token id 400"),
    "a prompt that is no text": Kind([{"prompt": b"Hi"}, {"prompt": None}, {"prompt": ["Hi"]}], "`prompt` of this request"),
    # Lengths and numbers
    "nothing asked": Kind([{"max_tokens": 0}], "`max_tokens=0` without `echo_prompt`"),
    "huge max_tokens": Kind([{"max_tokens": 10**9}, {"max_tokens": CONTEXT}], "context holds 2048"),
    "negative max_tokens": Kind([{"max_tokens": -1}], "max_tokens must be "),
    "max_tokens of another type": Kind([{"max_tokens": value} for value in ("5", 2.5, None)], "`max_tokens` of this request"),
    "temperature out of range": Kind([{"temperature": value} for value in (math.nan, math.inf, -0.5)], "temperature must be"),
    "temperature of another type": Kind([{"temperature": value} for value in ("0", None)], "`temperature` of this request"),
    "extreme temperature": Kind([{"temperature": value} for value in (1e-300, 1e-4, 1.1e-3, 1e6, 1e300)]),
    "top_p out of range": Kind([{"top_p": value, "temperature": 1.0} for value in (0, 2, math.nan, -0.1)], "top_p must be"),
    "extreme top_p": Kind([{"top_p": value, "temperature": 1.0} for value in (1e-300, 1.0 - 1e-16)]),
    "50 completions": Kind([{"num_completions": 50, "temperature": value} for value in (0.0, 1.0)]),
    "completions of a scored prompt": Kind([{"num_completions": 3, "max_tokens": 0, "echo_prompt": True}]),
    "number of completions": Kind([{"num_completions": value} for value in (0, -1, 10**9)], "num_completions "),
    "number of candidates": Kind([{"top_k_per_token": value} for value in (-1, 10**6)], "top_k_per_token "),
    "no candidates": Kind([{"top_k_per_token": 0}]),
    "any seed": Kind([{"random": value, "temperature": 1.0} for value in ("", "\ud800", "1" * 500, "\0")]),
    "seed of another type": Kind([{"random": 3}], "`random` of this request"),
    # Stop strings
    "empty stop string": Kind([{"stop_sequences": [""]}, {"stop_sequences": ["\n", ""]}], "none of them empty"),
    "long stop strings": Kind([{"stop_sequences": ["x" * 100]}, {"stop_sequences": ["\n" * 100, "ab" * 50]}]),
    "many stop strings": Kind([{"stop_sequences": [f"stop {number}" for number in range(500)]}]),
    "stop strings of another type": Kind([{"stop_sequences": "\n"}, {"stop_sequences": None}], "`stop_sequences` of this"),
    "stop strings that are no text": Kind(
        [{"stop_sequences": [value]} for value in (None, 3, b"\n")], "must be a tuple of strings"
    ),
    "half of a surrogate pair as stop": Kind([{"stop_sequences": ["\ud800"]}]),
    # What is not supported
    "echo of a completion": Kind([{"echo_prompt": True}], "`echo_prompt` with `max_tokens`"),
    "penalties": Kind(
        [{"presence_penalty": 1.0}, {"frequency_penalty": math.nan}], "`presence_penalty` or `frequency_penalty`"
    ),
    "embedding": Kind([{"embedding": True}, {"embedding": "False"}], "`embedding`"),
    "echo of another type": Kind([{"echo_prompt": "False"}, {"echo_prompt": None}], "`echo_prompt` of this request"),
    "images": Kind(
        [{"prompt": "", "multimodal_prompt": IMAGE}, {"image_generation_parameters": ImageGenerationParameters()}], "multimodal"
    ),
    "response format": Kind([{"response_format": ResponseFormat(json_schema={})}], "`response_format`"),
    # Conversations
    "messages": Kind([{"prompt": "", "messages": CHAT}, {"prompt": "", "messages": [{"role": "user", "content": ""}]}]),
    "no messages": Kind([{"prompt": "", "messages": []}], "messages are []"),
    "messages and a prompt": Kind([{"messages": CHAT}], "`messages` beside a `prompt`"),
    "scored messages": Kind([{"prompt": "", "messages": CHAT, "max_tokens": 0, "echo_prompt": True}], "`echo_prompt` with"),
    "messages of another type": Kind([{"prompt": "", "messages": "Hi"}], "`messages` of this request"),
    "malformed messages": Kind(
        [{"prompt": "", "messages": [value]} for value in ("Hi", {}, {("a",): 1}, None)], "Message 0 is"
    ),
    "unknown role": Kind([{"prompt": "", "messages": [{"role": "tool", "content": "4"}]}], "has the role 'tool'"),
    "message that is no text": Kind([{"prompt": "", "messages": [{"role": "user", "content": 4}]}], "only text is supported"),
    "half of a surrogate pair in a message": Kind(
        [{"prompt": "", "messages": [{"role": "user", "content": "\udc00"}]}], "half of a surrogate pair"
    ),
    "a long conversation": Kind([{"prompt": "", "messages": CHAT * 500}], "context holds 2048"),
}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelDeployment]:
    """Random Llama with a context of 2,048 tokens. Rows have one size for client and runner, so their bits are the same."""
    folder = tmp_path_factory.mktemp("hostile")
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    save_llama(tokenizer, folder, context=CONTEXT)
    tokenizer.add_tokens([BEYOND])
    tokenizer.save_pretrained(folder)
    policy = {"gpu_batch_size": 16, "gpu_batch_tokens": 64}
    deployment = ModelDeployment("flexgen/test/hostile", ClientSpec(CLIENT, {"name_or_path": str(folder), "policy": policy}))
    register_model_deployment(deployment)
    yield deployment
    ENGINES.close()


def request(**fields: Any) -> Request:
    ordinary: Fields = {"prompt": "The quick brown fox", "max_tokens": 4, "temperature": 0.0}
    return Request(model="test/hostile", model_deployment="flexgen/test/hostile", **{**ordinary, **fields})


def hostile_requests(count: int) -> list[tuple[str, Request]]:
    """Returns every variant of every kind, and as many more in any order as there is room for."""
    variants = [(name, fields) for name, kind in KINDS.items() for fields in kind.variants]
    generator = random.Random(5)
    cheap = [(name, fields) for name, fields in variants if name != "exactly the context"]
    chosen = variants + generator.choices(cheap, k=max(0, count - len(variants)))
    generator.shuffle(chosen)
    return [(name, request(**fields)) for name, fields in chosen]


def by_client(requests: list[Request], folder: Path) -> list[RequestResult]:
    folder.mkdir()
    client = AutoClient({}, str(folder), SqliteCacheBackendConfig(str(folder)))
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(client.make_request, requests, timeout=100))


def by_runner(requests: list[Request], folder: Path, deployment: ModelDeployment) -> list[RequestResult]:
    folder.mkdir(exist_ok=True)
    cache = ENGINES.caches.get(SqliteCacheBackendConfig(str(folder)).get_cache_config("flexgen"))
    with Journal(folder / "journal", ["hostile"]) as journal:
        console = Console(None)
        server = EngineServer(ENGINES, journal, console)
        return serve(deployment, requests, cache, journal, server, console).results


def assert_as_documented(name: str, asked: Request, result: RequestResult) -> None:
    refusal = KINDS[name].refusal
    if refusal:
        assert not result.success, name
        assert result.error is not None
        assert result.error.startswith("InvalidJob: "), (name, result.error)
        assert refusal in result.error, (name, result.error)
        return
    assert result.success, (name, result.error)
    assert len(result.completions) == asked.num_completions
    for output in result.completions:
        assert all(math.isfinite(token.logprob) and token.logprob <= 0 for token in output.tokens), name
        assert output.logprob == sum(token.logprob for token in output.tokens)
        assert len(output.tokens) <= (asked.max_tokens or CONTEXT)
        assert not any(stop in output.text for stop in asked.stop_sequences)
        assert output.finish_reason in [{"reason": reason} for reason in ("length", "stop", "endoftext")]
        assert asked.max_tokens or output.text == asked.prompt


def timed(action: Callable[[], list[RequestResult]], seconds: float) -> list[RequestResult]:
    begin = time.monotonic()
    results = action()
    assert time.monotonic() - begin < seconds
    return results


@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_requests_end_as_documented(count: int, deployment: ModelDeployment, tmp_path: Path) -> None:
    named = hostile_requests(count)
    requests = [asked for _, asked in named]
    probes = [request(prompt=f"{number} foxes", max_tokens=8, temperature=number % 2) for number in range(6)]
    before = by_client(probes, tmp_path / "before")
    clients = timed(lambda: by_client(requests, tmp_path / "client"), 60)
    runners = timed(lambda: by_runner(requests, tmp_path / "runner", deployment), 60)
    for (name, asked), client, runner in zip(named, clients, runners, strict=True):
        assert_as_documented(name, asked, client)
        assert (client.error, client.completions) == (runner.error, runner.completions), name
    after = by_client(probes, tmp_path / "after")
    assert [result.completions for result in after] == [result.completions for result in before]
    assert not any(result.cached for result in after)


def test_answers_that_were_computed_are_cached_and_refusals_are_not(deployment: ModelDeployment, tmp_path: Path) -> None:
    named = hostile_requests(0)
    requests = [asked for _, asked in named]
    first, again = (by_runner(requests, tmp_path, deployment) for _ in range(2))
    assert [result.cached for result in again] == [result.success for result in first]
    assert [result.completions for result in again] == [result.completions for result in first]


def test_a_stop_string_with_which_the_answer_begins_leaves_nothing(deployment: ModelDeployment, tmp_path: Path) -> None:
    (free,) = by_runner([request()], tmp_path, deployment)
    text = free.completions[0].text
    stops = [text[:1], text, text[:2] + "never"]
    cut, whole, other = by_runner([request(stop_sequences=[stop]) for stop in stops], tmp_path, deployment)
    for result in (cut, whole):
        (output,) = result.completions
        assert (output.text, output.tokens, output.logprob, output.finish_reason) == ("", [], 0, {"reason": "stop"})
    assert other.completions == free.completions


def test_temperatures_at_which_sampling_is_greedy(deployment: ModelDeployment, tmp_path: Path) -> None:
    """HELM asks at 1e-4 where it knows a model to be wrong at 0."""
    cold, colder, warm = by_runner([request(temperature=value) for value in (0, 1e-4, 5.0)], tmp_path, deployment)
    assert cold.completions == colder.completions != warm.completions


def test_seeds_decide_samples_and_candidates_do_not(deployment: ModelDeployment, tmp_path: Path) -> None:
    sampled: Fields = {"temperature": 1.0, "num_completions": 3, "max_tokens": 8}
    asked: list[Fields] = [{}, {"top_k_per_token": 1}, {"top_k_per_token": 5}, {"random": "1"}, {"random": "2"}]
    results = by_runner([request(**sampled, **fields) for fields in asked], tmp_path, deployment)
    default, one, five, first, second = ([output.text for output in result.completions] for result in results)
    assert default == one == five
    assert len({*default, *first, *second}) == 9
