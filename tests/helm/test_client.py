"""The client as HELM uses it: through ``AutoClient``, from several threads, with retries and a cache."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helm.clients.auto_client import AutoClient
from helm.common.cache_backend_config import BlackHoleCacheBackendConfig, SqliteCacheBackendConfig
from helm.common.request import Request

from flexgen_helm import Engine
from flexgen_helm.errors import FlexGenError, UnsupportedModel
from flexgen_helm.helm.client import FlexGenClient
from flexgen_helm.helm.deployment import DeploymentError
from flexgen_helm.helm.registry import ENGINES, load_engine
from tests.helm.fakes import REFUSED, FakeEngine, FakeLoader


@pytest.fixture
def client(tmp_path: Path) -> AutoClient:
    return auto_client(tmp_path)


def auto_client(folder: Path, *, cached: bool = True) -> AutoClient:
    backend = SqliteCacheBackendConfig(str(folder)) if cached else BlackHoleCacheBackendConfig()
    return AutoClient({}, str(folder), backend)


def request(prompt: str = "word", deployment: str = "flexgen/test/letters", **fields: Any) -> Request:
    model = deployment.removeprefix("flexgen/")
    return Request(model=model, model_deployment=deployment, prompt=prompt, max_tokens=5, temperature=0, **fields)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_concurrent_requests_are_in_the_engine_together(client: AutoClient, loader: FakeLoader) -> None:
    client.make_request(request("first"))
    engine = loader.engine
    engine.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(client.make_request, request(f"word {number}")) for number in range(8)]
        wait_until(lambda: len(engine.submitted) == 9)
        engine.gate.set()
        results = [future.result(timeout=20) for future in futures]
    assert [result.completions[0].text for result in results] == [f" {number} dr" for number in range(8)]
    assert 8 in {result.batch_size for result in results}
    assert loader.attempts == 1
    assert ENGINES.borrowers == 0


def test_a_clock_that_is_set_back_changes_no_duration(client: AutoClient, loader: FakeLoader) -> None:
    now = itertools.count(2_000_000_000, -1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.time", lambda: float(next(now)))
        result = client.make_request(request("word"))
    assert result.request_time is not None
    assert 0 <= result.request_time < 1000


def test_client_loads_small_rows_and_says_once_that_the_runner_is_faster(
    client: AutoClient, loader: FakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="helm"):
        for prompt in ("one", "two"):
            client.make_request(request(prompt))
    assert loader.few_requests is True
    assert [record.getMessage().count("FlexGenRunner") for record in caplog.records].count(1) == 1


def test_invalid_request_fails_at_once_and_leaves_the_engine_alone(client: AutoClient, loader: FakeLoader) -> None:
    begin = time.monotonic()
    refused = client.make_request(request(f"{REFUSED} mind"))
    unsupported = client.make_request(request(presence_penalty=1.0))
    assert time.monotonic() - begin < 60  # HELM repeats for 150 seconds
    assert not refused.success
    assert "refuses this prompt" in (refused.error or "")
    assert "presence_penalty" in (unsupported.error or "")
    assert client.make_request(request()).success
    assert loader.attempts == 1


def test_unexpected_error_is_not_repeated(client: AutoClient, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FakeEngine, "submit", fail)
    begin = time.monotonic()
    result = client.make_request(request())
    assert time.monotonic() - begin < 60  # HELM repeats for 150 seconds
    assert result.error == "RuntimeError: out of memory"
    assert ENGINES.borrowers == 0


def test_refused_model_is_loaded_once(client: AutoClient, loader: FakeLoader) -> None:
    loader.error = UnsupportedModel("falcon cannot be packed")
    results = [client.make_request(request(prompt)) for prompt in ("one", "two")]
    assert [result.error for result in results] == ["UnsupportedModel: falcon cannot be packed"] * 2
    assert loader.attempts == 1


def test_missing_memory_may_be_there_later(client: AutoClient, loader: FakeLoader) -> None:
    loader.error = FlexGenError("not now")
    assert not client.make_request(request()).success
    loader.error = None
    assert client.make_request(request()).success


def test_answers_are_cached_for_equal_numerics_only(tmp_path: Path, loader: FakeLoader) -> None:
    first = auto_client(tmp_path).make_request(request())
    again = auto_client(tmp_path).make_request(request())
    assert (first.cached, again.cached) == (False, True)
    assert again.completions == first.completions
    assert len(loader.engine.submitted) == 1
    ENGINES.close()
    loader.version = 2
    other = auto_client(tmp_path).make_request(request())
    assert not other.cached
    assert len(loader.engines[1].submitted) == 1


def test_no_cache_is_written_when_disabled(tmp_path: Path, loader: FakeLoader) -> None:
    client = auto_client(tmp_path, cached=False)
    assert [client.make_request(request()).cached for _ in range(2)] == [False, False]
    assert list(tmp_path.iterdir()) == []


def test_concurrent_writers_do_not_lock_each_other_out(
    tmp_path: Path, loader: FakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    client = auto_client(tmp_path)
    begin = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(client.make_request, [request(f"word {number}") for number in range(200)]))
        results = list(pool.map(client.make_request, [request(f"word {number}") for number in range(200)]))
    assert all(result.cached for result in results)
    # HELM repeats a failed write after 4 seconds.
    assert "locked" not in caplog.text
    assert len(loader.engine.submitted) == 200
    assert time.monotonic() - begin < 60


def test_another_deployment_waits_and_closes_the_first(client: AutoClient, loader: FakeLoader) -> None:
    client.make_request(request())
    first = loader.engine
    first.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        pending = pool.submit(client.make_request, request("slow"))
        wait_until(lambda: len(first.submitted) == 2)
        other = pool.submit(client.make_request, request(deployment="flexgen/test/others"))
        time.sleep(0.1)
        assert not first.closed
        assert loader.attempts == 1
        first.gate.set()
        assert pending.result(timeout=20).success
        assert other.result(timeout=20).success
    assert [engine.closed for engine in loader.engines] == [True, False]


def test_threads_share_one_engine_although_helm_makes_a_client_for_each(tmp_path: Path, loader: FakeLoader) -> None:
    barrier = threading.Barrier(4)

    def make_request(number: int) -> bool:
        client = auto_client(tmp_path)
        barrier.wait(timeout=20)
        return bool(client.make_request(request(f"word {number}")).success)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(make_request, range(4)))
    assert loader.attempts == 1


def test_arguments_that_name_no_model_or_no_such_policy_are_refused() -> None:
    backend = BlackHoleCacheBackendConfig().get_cache_config("flexgen")
    with pytest.raises(DeploymentError, match="`name_or_path`"):
        FlexGenClient(backend, dtype="float32")
    with pytest.raises(DeploymentError, match=r"`gpu_batch`.*`gpu_batch_size`"):
        FlexGenClient(backend, name_or_path="folder", policy={"gpu_batch": 4})


def test_unknown_keyword_of_from_pretrained_is_refused(client: AutoClient) -> None:
    with pytest.raises(DeploymentError, match=r"client_spec.args has no key `dytpe`. Did you mean `dtype`\?"):
        client.make_request(request(deployment="flexgen/test/misspelt"))


def test_what_the_engine_says_while_it_loads_is_in_helms_log(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    ours, helms = logging.getLogger("flexgen_helm"), logging.getLogger("helm")
    monkeypatch.setattr(helms, "handlers", [handler])
    monkeypatch.setattr(helms, "level", logging.INFO)

    def from_pretrained(name_or_path: str) -> FakeEngine:
        logging.getLogger("flexgen_helm.runtime").info("loading %s", name_or_path)
        return FakeEngine({"name_or_path": name_or_path})

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    before = (ours.level, list(ours.handlers))
    load_engine({"name_or_path": "letters"}, few_requests=False)
    assert lines == ["loading letters"]
    assert (ours.level, ours.handlers) == before
