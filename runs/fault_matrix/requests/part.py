"""Hostile requests through client and runner: each is answered right or refused by name, whoever its neighbours are."""

from __future__ import annotations

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
from helm.clients.auto_client import AutoClient
from helm.common.cache_backend_config import SqliteCacheBackendConfig
from helm.common.request import RequestResult

from flexgen_helm import errors
from flexgen_helm.helm.console import Console
from flexgen_helm.helm.deployment import CLIENT
from flexgen_helm.helm.journal import Journal
from flexgen_helm.helm.registry import ENGINES
from flexgen_helm.helm.workload import EngineServer, serve
from flexgen_helm.runs.fault_matrix.notes import use_own_notes
from flexgen_helm.runs.fault_matrix.outcomes import Outcome, merged
from flexgen_helm.runs.fault_matrix.requests.hostile import Hostile, hostile_requests
from flexgen_helm.runs.fault_matrix.requests.known import Known
from flexgen_helm.runs.fault_matrix.requests.rules import reasons
from flexgen_helm.runs.fault_matrix.tiny_model import tiny_model

ANSWER_S = 300.0
THREADS = 8
POLICY = {"gpu_batch_size": 16, "gpu_batch_tokens": 64}
"""Row sizes of client and runner, so that equal answers have equal bits."""
NAMES = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.FlexGenError)}


class RequestsPart:
    """See `flexgen_helm.runs.fault_matrix.worker.Part`."""

    def __init__(self, folder: Path) -> None:
        use_own_notes(folder)
        self._folder = folder
        model = tiny_model(folder / "model")
        shutil.rmtree(folder / "batch", ignore_errors=True)
        arguments = {"name_or_path": str(model), "policy": POLICY}
        self._deployment = ModelDeployment("flexgen/fault/matrix", ClientSpec(CLIENT, arguments))
        register_model_deployment(self._deployment)
        self._known = Known(model)

    def run(self, case: str) -> list[Outcome]:
        """Send a batch twice: to the client by several threads, and to the runner at once."""
        _, number, size = case.split()
        asked = hostile_requests(int(size), f"requests {number}")
        client, runner = self._by_client(asked), self._by_runner(asked)
        ENGINES.caches.close()
        shutil.rmtree(self._folder / "batch")
        found = enumerate(zip(asked, client, runner, strict=True))
        outcomes: list[Outcome] = merged(
            self._judge(one, by_client, by_runner, position) for position, (one, by_client, by_runner) in found
        )
        return outcomes

    def _by_client(self, asked: list[Hostile]) -> list[RequestResult | Exception]:
        cache = self._folder / "batch" / "client"
        cache.mkdir(parents=True)
        client = AutoClient({}, str(cache), SqliteCacheBackendConfig(str(cache)))

        def answer(one: Hostile) -> RequestResult | Exception:
            try:
                return client.make_request(one.request)
            except Exception as error:
                return error

        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(answer, asked, timeout=ANSWER_S))

    def _by_runner(self, asked: list[Hostile]) -> list[RequestResult]:
        folder = self._folder / "batch" / "runner"
        folder.mkdir(parents=True)
        cache = ENGINES.caches.get(SqliteCacheBackendConfig(str(folder)).get_cache_config("flexgen"))
        with Journal(folder / "journal", ["hostile"]) as journal:
            requests = [one.request for one in asked]
            console = Console(None)
            served = serve(self._deployment, requests, cache, journal, EngineServer(ENGINES, journal, console), console)
            results: list[RequestResult] = served.results
            return results

    def _judge(self, one: Hostile, client: RequestResult | Exception, runner: RequestResult, position: int) -> Outcome:
        if isinstance(client, Exception):
            return Outcome(one.fault, "traceback", note=f"{one.fields!r:.300}: {type(client).__name__}: {client}")
        if (client.error, client.completions) != (runner.error, runner.completions):
            return _wrong(one, f"client and runner differ: {client.error or client.completions!r:.200}")
        words = reasons(one.fields, self._known.tokenizer)
        if not client.success:
            return _judge_refusal(one, str(client.error), words)
        if words:
            return _wrong(one, f"answered, though to be refused for {words}")
        fault = self._fault(one.fields, client, position)
        return _wrong(one, fault) if fault else Outcome(one.fault, "answered")

    def _fault(self, fields: dict[str, Any], result: RequestResult, position: int) -> str:
        """Return in words what is wrong with an answer; empty if nothing is."""
        outputs = result.completions
        if len(outputs) != fields.get("num_completions", 1):
            return f"{len(outputs)} completions"
        for output in outputs:
            logprobs = [token.logprob for token in output.tokens]
            if not all(math.isfinite(value) and value <= 0 for value in logprobs) or output.logprob != sum(logprobs):
                return f"log-probabilities {logprobs}, sum {output.logprob}"
            if not fields.get("echo_prompt") and any(stop in output.text for stop in fields.get("stop_sequences", [])):
                return "the text holds a stop string"
            if not fields.get("echo_prompt") and len(output.tokens) > fields["max_tokens"]:
                return f"{len(output.tokens)} tokens"
        if fields.get("echo_prompt"):
            return next(filter(None, (self._known.fault_of_scores(each, fields["prompt"]) for each in outputs[:1])), "")
        if fields["temperature"] > 0.001:
            return ""  # samples: client and runner agree on them by every bit
        text = fields["prompt"]
        if fields.get("messages") is not None:
            text = self._known.conversation(fields["messages"])
        if any(each != outputs[0] for each in outputs):
            return "greedy completions differ"
        fault: str = self._known.fault_of_completion(outputs[0], text, fields)
        return fault


def _judge_refusal(one: Hostile, error: str, words: list[str]) -> Outcome:
    if error.partition(":")[0] not in NAMES or error.startswith("JobFailed"):
        return Outcome(one.fault, "traceback", note=f"{one.fields!r:.300}: {error[:500]}")
    if not any(word in error for word in words):
        return _wrong(one, f"refused with {error[:300]!r}, expected {words or 'an answer'}")
    return Outcome(one.fault, "refused")


def _wrong(one: Hostile, note: str) -> Outcome:
    return Outcome(one.fault, "wrong", note=f"{one.fields!r:.300}: {note}")
