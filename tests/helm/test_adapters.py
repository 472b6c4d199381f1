"""Adapter methods of HELM that few run entries use: chat and binary ranking, and completions longer than the context."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helm.benchmark.adaptation.adapter_spec import ADAPT_CHAT, AdapterSpec
from helm.benchmark.adaptation.common_adapter_specs import get_ranking_binary_adapter_spec
from helm.benchmark.metrics.common_metric_specs import get_basic_metric_specs
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.run_specs.capabilities_run_specs import get_gpqa_spec, get_ifeval_spec, get_mmlu_pro_spec
from helm.benchmark.runner import Runner, RunnerError
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
from transformers import AutoTokenizer

import flexgen_helm.plugin  # noqa: F401  registers the generators of deployments
from flexgen_helm.helm.runner import FlexGenRunner
from tests.helm.conftest import RunSuite
from tests.helm.fakes import FakeLoader
from tests.helm.files import read, timeless
from tests.reference import TOKEN_TOLERANCE
from tests.reference import Reference as Model
from tests.text_models import CHATML, save_llama
from tests.tiny_tokenizers import byte_level

pytestmark = pytest.mark.usefixtures("close_engine")
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The quick brown fox?"}],
    [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "naïve 日本語"}],
]


class QuestionsScenario(Scenario):
    """Conversations, or questions with passages that may answer them."""

    name = "questions"
    description = "Questions"
    tags: ClassVar[list[str]] = []  # type: ignore[misc]

    def __init__(self, chat: bool = False) -> None:
        super().__init__()
        self._chat = chat

    def get_instances(self, output_path: str) -> list[Instance]:
        if self._chat:
            return [Instance(Input(messages=messages), references=[], split=TEST_SPLIT) for messages in CONVERSATIONS]
        texts = {"Who is quick?": "The fox", "Who is lazy?": "The dog", "Where is Paris?": "France"}
        splits = [TRAIN_SPLIT, TRAIN_SPLIT, TEST_SPLIT]
        return [self._instance(*item, split) for item, split in zip(texts.items(), splits, strict=True)]

    @staticmethod
    def _instance(question: str, answer: str, split: str) -> Instance:
        passages = [(f"{answer} is.", [CORRECT_TAG]), ("Nobody knows.", [])]
        references = [Reference(Output(text), tags) for text, tags in passages]
        return Instance(Input(text=question), references=references, split=split)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer adds a BOS token, which its chat template does not write."""
    tokenizer = byte_level(adds_bos=True)
    tokenizer.chat_template = CHATML
    return save_llama(tokenizer, tmp_path_factory.mktemp("org") / "adapters", context=2048)


def run_spec(adapter_spec: AdapterSpec, folder: Path, **scenario: Any) -> RunSpec:
    return RunSpec(
        name="questions",
        scenario_spec=ScenarioSpec("tests.helm.test_adapters.QuestionsScenario", args=scenario),
        adapter_spec=replace(adapter_spec, model="/".join(folder.parts[-2:]), model_deployment=f"flexgen/{folder}"),
        metric_specs=get_basic_metric_specs([]),
        groups=["questions"],
    )


def judges(folder: Path) -> tuple[Model, Any]:
    return Model(folder), AutoTokenizer.from_pretrained(folder)


def assert_equals_generate(state: dict[str, Any], input_ids: list[int], model: Model, tokenizer: Any) -> None:
    """Compares a completion with the library's."""
    (output,) = state["result"]["completions"]
    expected, stops = model.greedy(input_ids, state["request"]["max_tokens"]), state["request"]["stop_sequences"]
    text = tokenizer.decode(expected.token_ids, skip_special_tokens=True)
    ended = model.end_tokens.intersection(expected.token_ids)
    reason = "stop" if any(stop in text for stop in stops) else "endoftext" if ended else "length"
    logprobs = expected.logprobs[: len(output["tokens"])]
    assert output["text"] == min((text[: text.index(stop)] for stop in stops if stop in text), key=len, default=text)
    assert output["finish_reason"] == {"reason": reason}
    assert [token["logprob"] for token in output["tokens"]] == pytest.approx(logprobs, abs=TOKEN_TOLERANCE)
    assert output["logprob"] == pytest.approx(sum(logprobs), abs=TOKEN_TOLERANCE * len(logprobs))
    assert reason == "stop" or len(output["tokens"]) == len(expected.token_ids) - len(ended)


@pytest.mark.parametrize("runner", [FlexGenRunner, Runner])
def test_chat_adapter(runner: type[Runner], folder: Path, run_suite: RunSuite) -> None:
    spec = run_spec(AdapterSpec(method=ADAPT_CHAT, max_tokens=12, temperature=0.0, num_outputs=1), folder, chat=True)
    states = read(run_suite([spec], runner), "questions", "scenario_state.json")["request_states"]
    model, tokenizer = judges(folder)
    assert [state["request"]["messages"] for state in states] == CONVERSATIONS
    for state in states:
        ids = tokenizer.apply_chat_template(state["request"]["messages"], tokenize=True, add_generation_prompt=True)
        assert_equals_generate(state, list(ids["input_ids"]), model, tokenizer)


@pytest.mark.parametrize("runner", [FlexGenRunner, Runner])
def test_binary_ranking_adapter(runner: type[Runner], folder: Path, run_suite: RunSuite) -> None:
    spec = run_spec(get_ranking_binary_adapter_spec(max_train_instances=4, stop_sequences=["\n"]), folder)
    states = read(run_suite([spec], runner), "questions", "scenario_state.json")["request_states"]
    model, tokenizer = judges(folder)
    # One request for each passage of the one question.
    assert [(state["reference_index"], state["request_mode"]) for state in states] == [(0, "original"), (1, "original")]
    for state in states:
        assert state["request"]["prompt"].count("Does the passage answer the query?") == 5
        assert_equals_generate(state, tokenizer(state["request"]["prompt"])["input_ids"], model, tokenizer)


def test_a_repeated_suite_of_conversations_is_cached(folder: Path, run_suite: RunSuite) -> None:
    spec = run_spec(AdapterSpec(method=ADAPT_CHAT, max_tokens=3, temperature=0.0), folder, chat=True)
    suites = [run_suite([spec], suite=name) for name in ("first", "second")]
    first, second = (read(suite, "questions", "scenario_state.json") for suite in suites)
    assert timeless(first) == timeless(second)
    assert [state["result"]["cached"] for state in second["request_states"]] == [True] * len(CONVERSATIONS)


LONG = {
    "mmlu_pro": get_mmlu_pro_spec(),
    "mmlu_pro, 5 examples": get_mmlu_pro_spec(use_few_shot="true"),
    "gpqa": get_gpqa_spec(subset="main"),
    "ifeval": get_ifeval_spec(),
}


@pytest.mark.parametrize("runner", [FlexGenRunner, Runner])
@pytest.mark.parametrize("name", LONG)
def test_completions_that_fill_the_context_are_refused_at_once(
    name: str, runner: type[Runner], folder: Path, run_suite: RunSuite, loader: FakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    """The adapter settings are those of the run spec, whose data would have to be fetched."""
    begin = time.monotonic()
    with caplog.at_level("INFO", logger="helm"), pytest.raises(RunnerError, match="questions"):
        run_suite([run_spec(LONG[name].adapter_spec, folder)], runner)
    assert time.monotonic() - begin < 60
    assert "The run asks for completions of 4096 tokens" in caplog.text
    assert "have room for 2047" in caplog.text
    assert loader.attempts == 0
