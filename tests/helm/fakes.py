"""An engine without a model, and the run entries and deployments with which HELM meets it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, ClassVar, Literal

from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.metrics.common_metric_specs import get_exact_match_metric_specs
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    TEST_SPLIT,
    TRAIN_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioSpec,
)
from helm.benchmark.window_services.local_window_service import LocalWindowService

from flexgen_helm.errors import FlexGenError, InvalidJob
from flexgen_helm.run_stats import RunStats, SweepStats
from flexgen_helm.types import (
    CacheNumerics,
    Completion,
    EngineInfo,
    FinishReason,
    Job,
    MachineNumerics,
    Numerics,
    ResolvedPolicy,
    Result,
    RowNumerics,
    WeightNumerics,
)

REFUSED = "never"
"""A prompt with this word is an invalid job for the fake engine."""
POLICY = ResolvedPolicy(gpu_batch_size=64, gpu_batch_tokens=512)
OUTPUTS = ("yes", "no", "maybe")


def numerics_of(weights: str, version: int = 1, scheme: str = "plain") -> Numerics:
    """Numerics of an engine on a CPU, whose weights have this digest and compression."""
    rows = RowNumerics("packed", POLICY.gpu_batch_size, POLICY.gpu_batch_tokens)
    return Numerics(WeightNumerics(weights, "float32", scheme), CacheNumerics("float32"), rows, MachineNumerics("cpu"), version)


class FakeEngine:
    """Tokens are letters, and the answer to a prompt is its last line backwards and then a line that nobody wants."""

    def __init__(self, arguments: dict[str, Any], *, version: int = 1) -> None:
        self.arguments = arguments
        self.numerics = numerics_of(arguments["name_or_path"], version, arguments.get("compression", "plain"))
        self.stats = RunStats()
        self.runs: list[list[Job]] = []
        self.submitted: list[Job] = []
        self.closed = False
        self.gate = threading.Event()
        """Answers to submitted jobs wait for it."""
        self.gate.set()

    def run(
        self,
        jobs: Sequence[Job],
        on_result: Callable[[int, Result], None] | None = None,
        on_error: Literal["raise", "return"] = "raise",
        progress: bool | None = None,
    ) -> list[Result]:
        assert on_error == "return"
        self.runs.append(list(jobs))
        results = []
        for position, job in enumerate(jobs):
            try:
                results.append(self.answer(job))
            except FlexGenError as error:
                results.append(Result(error=error))
            if on_result is not None:
                on_result(position, results[-1])
        asked = sum(len(job.prompt or "") for job in jobs)
        moved, busy = {"disk_read": 8}, {"disk_read": 0.5}
        self.stats = RunStats(
            len(jobs),
            prompt_tokens_asked=asked,
            prompt_tokens_computed=asked // 2,
            seconds=2.0,
            tier_peak_bytes={"host": 4, "disk": 8},
            bytes_moved=moved,
            busy_seconds=busy,
            device_wait_seconds={"weights": 0.5},
            per_sweep=[SweepStats(0.0, 2.0, asked // 2, 0, len(jobs), moved, moved, busy)],
        )
        return results

    def submit(self, job: Job) -> Future[Result]:
        self.submitted.append(job)
        answer = self.answer(job)
        future: Future[Result] = Future()

        def finish() -> None:
            self.gate.wait(timeout=30)
            future.set_result(answer)

        threading.Thread(target=finish, daemon=True).start()
        return future

    def describe(self) -> EngineInfo:
        return EngineInfo(POLICY, self.numerics, 32.0, 32.0, {"device": 4, "host": 0, "disk": 0})

    def with_limit(self, stats: RunStats) -> RunStats:
        sweeps = [replace(sweep, limit_seconds=sweep.seconds / 2, limited_by="disk_read") for sweep in stats.per_sweep]
        return replace(stats, limit_seconds=stats.seconds / 2, per_sweep=sweeps) if stats.num_jobs else stats

    def close(self) -> None:
        self.closed = True

    @staticmethod
    def answer(job: Job) -> Result:
        assert job.prompt is not None
        if REFUSED in job.prompt:
            raise InvalidJob("the fake engine refuses this prompt")
        letters = list(job.prompt)
        completions = [_complete(job, number) for number in range(job.num_completions)] if job.max_new_tokens else []
        return Result(
            completions=completions,
            prompt_token_ids=[ord(letter) for letter in letters],
            prompt_token_texts=letters if job.score_prompt else [],
            prompt_logprobs=[_logprob(letter) for letter in letters] if job.score_prompt else None,
        )


def _logprob(letter: str) -> float:
    return -(ord(letter) % 7) / 4


def _complete(job: Job, number: int) -> Completion:
    assert job.prompt is not None
    letters = list(" " + job.prompt.splitlines()[-1][::-1] + "!" * number + "\nQuestion:")[: job.max_new_tokens]
    text, reason = "".join(letters), "length"
    for stop in job.stop:
        if stop in text:
            text, reason = text[: text.index(stop)], "stop"
            letters = letters[: len(text) + 1]
    finish_reason: FinishReason = "stop" if reason == "stop" else "length"
    logprobs, ids = [_logprob(letter) for letter in letters], [ord(letter) for letter in letters]
    return Completion(text, ids, letters, logprobs, [[]] * len(letters), finish_reason, len(text))


class LettersWindowService(LocalWindowService):
    """HELM's own under another name, so that the plugin leaves it alone: there is no model to read a context of."""


class FakeLoader:
    """Stands in for ``load_engine`` and remembers what it made."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.version = 1
        self.error: FlexGenError | None = None
        self.attempts = 0
        self.few_requests: bool | None = None
        """What the last caller asked for."""
        self.workload: Sequence[Job] | None = None
        """Jobs that it announced."""

    def __call__(self, arguments: dict[str, Any], *, few_requests: bool, workload: Sequence[Job] | None = None) -> FakeEngine:
        self.few_requests, self.workload = few_requests, workload
        self.attempts += 1
        if self.error is not None:
            raise self.error
        self.engines.append(FakeEngine(arguments, version=self.version))
        return self.engines[-1]

    @property
    def engine(self) -> FakeEngine:
        """The only engine that was made."""
        (engine,) = self.engines
        return engine


class WordsScenario(Scenario):
    """A few words with three possible answers; every other one is right."""

    name = "words"
    description = "Words"
    tags: ClassVar[list[str]] = []  # type: ignore[misc]

    def __init__(self, words: str = "apple pear plum fig", broken: bool = False) -> None:
        super().__init__()
        self._words = words.split()
        self._broken = broken

    def get_instances(self, output_path: str) -> list[Instance]:
        if self._broken:
            raise ValueError("this scenario has no data")
        train = [self._instance(word, 0, TRAIN_SPLIT) for word in ("kiwi", "lime")]
        return train + [self._instance(word, number % 3, TEST_SPLIT) for number, word in enumerate(self._words)]

    @staticmethod
    def _instance(word: str, right: int, split: str) -> Instance:
        references = [
            Reference(Output(text=text), tags=[CORRECT_TAG] if number == right else []) for number, text in enumerate(OUTPUTS)
        ]
        return Instance(Input(text=word), references=references, split=split)


def run_spec(
    method: str = "generation", *, name: str | None = None, deployment: str = "flexgen/test/letters", **options: Any
) -> RunSpec:
    """Returns a run of ``WordsScenario``.

    Args:
        method: HELM's adapter method.
        name: Of the run; by default the method.
        deployment: Registered by ``conftest``.
        options: ``words`` and ``broken`` of the scenario; the others are fields of the adapter specification.
    """
    scenario: dict[str, Any] = {key: options.pop(key) for key in ("words", "broken") if key in options}
    separate = method.startswith("multiple_choice_separate")
    adapter: dict[str, Any] = {
        "instructions": "" if separate else "Answer the questions.\n",
        "max_train_instances": 0 if separate else 2,
        "max_tokens": 0 if separate else 12,
        "stop_sequences": [] if separate else ["\n"],
        "output_prefix": " " if separate else "Answer: ",
        "input_prefix": "" if separate else "Question: ",
        "input_suffix": "" if separate else "\n",
        "output_suffix": "" if separate else "\n",
        "temperature": 0.0,
        "max_eval_instances": 3,
        **options,
    }
    return RunSpec(
        name=name or method,
        scenario_spec=ScenarioSpec("tests.helm.fakes.WordsScenario", args=scenario),
        adapter_spec=AdapterSpec(
            method=method, model=deployment.removeprefix("flexgen/"), model_deployment=deployment, **adapter
        ),
        metric_specs=get_exact_match_metric_specs(),
        groups=["words"],
    )
