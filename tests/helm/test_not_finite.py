"""A request whose numbers are not finite fails alone; nothing of it is kept, and what earlier versions kept is not served."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
from helm.clients.auto_client import AutoClient
from helm.common.cache_backend_config import SqliteCacheBackendConfig
from helm.common.request import Request, RequestResult
from safetensors.torch import load_file, save_file

from flexgen_helm.errors import NotFinite
from flexgen_helm.helm.console import Console
from flexgen_helm.helm.deployment import CLIENT
from flexgen_helm.helm.journal import Journal
from flexgen_helm.helm.registry import ENGINES
from flexgen_helm.helm.requests import Response, Timing, to_response
from flexgen_helm.helm.response_cache import ResponseCache
from flexgen_helm.helm.workload import EngineServer, serve
from flexgen_helm.types import Completion, Result, TokenLogprob
from tests.text_models import save_llama
from tests.tiny_tokenizers import byte_level

WILD = "<|im_end|>"
"""A token whose activations overflow in float16."""
NAME = "flexgen/test/half"
PROMPTS = ["The quick brown fox", f"The quick {WILD} fox", "Where is it?"]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelDeployment]:
    folder, tokenizer = tmp_path_factory.mktemp("half"), byte_level()
    save_llama(tokenizer, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer.convert_tokens_to_ids(WILD)] *= 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    policy = {"gpu_batch_size": 16, "gpu_batch_tokens": 64}
    arguments = {"name_or_path": str(folder), "policy": policy, "dtype": "float16"}
    deployment = ModelDeployment(NAME, ClientSpec(CLIENT, arguments))
    register_model_deployment(deployment)
    yield deployment
    ENGINES.close()


def asked(**fields: Any) -> list[Request]:
    fields = {"max_tokens": 0, "echo_prompt": True, **fields}
    return [Request(model="test/half", model_deployment=NAME, prompt=prompt, temperature=0.0, **fields) for prompt in PROMPTS]


def cache_in(folder: Path) -> ResponseCache:
    return ENGINES.caches.get(SqliteCacheBackendConfig(str(folder)).get_cache_config("flexgen"))


def by_runner(requests: list[Request], folder: Path, deployment: ModelDeployment) -> list[RequestResult]:
    folder.mkdir(exist_ok=True)
    with Journal(folder / "journal", ["half"]) as journal:
        console = Console(None)
        server = EngineServer(ENGINES, journal, console)
        return serve(deployment, requests, cache_in(folder), journal, server, console).results


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 4, "echo_prompt": False}], ids=["scored", "generated"])
def test_one_request_fails_by_client_and_by_runner(deployment: ModelDeployment, tmp_path: Path, fields: dict[str, Any]) -> None:
    requests = asked(**fields)
    (tmp_path / "client").mkdir()
    client = AutoClient({}, str(tmp_path), SqliteCacheBackendConfig(str(tmp_path / "client")))
    for _ in range(2):
        one_by_one = [client.make_request(request) for request in requests]
        together = by_runner(requests, tmp_path / "runner", deployment)
        for results in (one_by_one, together):
            assert [result.success for result in results] == [True, False, True]
            assert "NotFinite: " in str(results[1].error)
            assert "overflows in float16: use bfloat16 or float32" in str(results[1].error)
            tokens = [token for result in results for output in result.completions for token in output.tokens]
            assert tokens
            assert all(math.isfinite(token.logprob) for token in tokens)
    assert [result.cached for result in together] == [True, False, True]
    journals = [path.read_text() for path in (tmp_path / "runner" / "journal").glob("*.jsonl")]
    assert sum(text.count('"response"') for text in journals) == 2
    assert not any("NaN" in text or "Infinity" in text for text in journals)


def with_logprob(response: Response, value: float) -> Response:
    completion = response["completions"][0]
    return {**response, "completions": [{**completion, "tokens": [("The", value), *completion["tokens"][1:]]}]}


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_earlier_versions_kept_is_computed_anew(
    deployment: ModelDeployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    requests, written = asked()[:1], dict[str, Response]()
    append = Journal.append

    def note(self: Journal, key: str, response: Response) -> None:
        written[key] = response
        append(self, key, response)

    monkeypatch.setattr(Journal, "append", note)
    (expected,) = by_runner(requests, tmp_path / "first", deployment)
    ((key, response),) = written.items()

    cached, resumed = tmp_path / "cached", tmp_path / "resumed"
    cached.mkdir()
    cache_in(cached).write([(key, with_logprob(response, value))])
    assert cache_in(cached).lookup([key]) == [None]
    with Journal(resumed / "journal", ["half"]) as journal:
        append(journal, key, with_logprob(response, value))
    for folder in (cached, resumed):
        written.clear()
        (result,) = by_runner(requests, folder, deployment)
        assert (result.completions, result.cached) == (expected.completions, False)
        assert list(written) == [key]
        (stored,) = cache_in(folder).lookup([key])
        assert stored is not None
    with Journal(resumed / "journal", ["half"]) as journal:
        assert journal.lookup(key) is not None  # the second record of the key, not the first


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["prompt", "completion", "candidate"])
def test_no_answer_is_made_of_what_is_not_finite(value: float, place: str) -> None:
    request = Request(model="a", model_deployment="b", prompt="ab", max_tokens=0 if place == "prompt" else 1)
    request = Request(**{**vars(request), "echo_prompt": place == "prompt"})
    logprob, candidate = (value, -1.0) if place == "completion" else (-1.0, value)
    completion = Completion("c", [5], ["c"], [logprob], [[TokenLogprob(5, candidate)]], "length", 1)
    scores = [0.0, value] if place == "prompt" else None
    result = Result([] if scores else [completion], [3, 4], ["a", "b"] if scores else [], scores)
    with pytest.raises(NotFinite, match="neither kept nor scored"):
        to_response(request, result, Timing(0.0, 1.0, 1))
