"""Inspect with the engine as its provider, against the engine itself and HELM's route to it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="needs Inspect, which comes with the extra `inspect`; make test-harnesses has it")

from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    Model,
    ModelOutput,
    ResponseSchema,
    get_model,
)
from inspect_ai.tool import ToolInfo
from inspect_ai.util import JSONSchema

from flexgen_helm import Engine, FlexGenError, InvalidJob, Job
from flexgen_helm.harnesses.inspect_provider import FlexGenAPI
from flexgen_helm.runs.harness_benchmark.sides import inspect_side
from tests.harnesses import page
from tests.harnesses.questions import made_questions

PROMPTS = ["The quick brown fox", "Question: What is the capital of France?\nAnswer:", "The quick brown", "naïve café 😀"]
GREEDY = {"max_tokens": 6, "temperature": 0.0, "logprobs": True, "top_logprobs": 3}


@pytest.fixture(scope="module")
def engine(chat_model: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(str(chat_model), device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(chat_model: Path) -> Iterator[Model]:
    """The model without its chat template, found by its name through the entry point."""
    with get_model(f"flexgen/{chat_model}", use_chat_template=False, device="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def chat(chat_model: Path) -> Iterator[Model]:
    with get_model(f"flexgen/{chat_model}", device="cpu") as model:
        yield model


def ask(model: Model, messages: Any, **settings: Any) -> ModelOutput:
    return asyncio.run(model.generate(messages, config=GenerateConfig(**settings)))


def together(model: Model, prompts: list[str], **settings: Any) -> list[ModelOutput]:
    async def all_of_them() -> list[ModelOutput]:
        return await asyncio.gather(*(model.generate(prompt, config=GenerateConfig(**settings)) for prompt in prompts))

    return asyncio.run(all_of_them())


def test_answers_and_log_probabilities_are_the_engines(plain: Model, engine: Engine) -> None:
    asked = [Job(prompt=prompt, max_new_tokens=6, top_logprobs=3) for prompt in PROMPTS]
    for output, result in zip(together(plain, PROMPTS, **GREEDY), engine.run(asked), strict=True):
        (completion,) = result.completions
        kept = completion.num_text_tokens
        assert output.completion == completion.text
        assert output.choices[0].logprobs is not None
        content = output.choices[0].logprobs.content
        assert [one.logprob for one in content] == completion.logprobs[:kept]
        assert [one.token for one in content] == completion.token_texts[:kept]
        tops = [[top.logprob for top in one.top_logprobs or []] for one in content]
        assert tops == [[logprob for _, logprob in top] for top in completion.top_logprobs[:kept]]
        assert output.usage is not None
        assert output.usage.input_tokens == len(result.prompt_token_ids)
        assert output.usage.output_tokens == len(completion.token_ids)


def test_log_probabilities_are_those_of_helms_route(plain: Model, chat_model: Path) -> None:
    pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")
    from helm.common.cache import BlackHoleCacheConfig
    from helm.common.request import Request

    import flexgen_helm.plugin  # noqa: F401 - HELM then knows the deployment
    from flexgen_helm.helm.client import FlexGenClient
    from flexgen_helm.helm.registry import ENGINES

    api = plain.api
    assert isinstance(api, FlexGenAPI)
    policy = api.late.get().numerics.policy_fields
    client = FlexGenClient(BlackHoleCacheConfig(), name_or_path=str(chat_model), device="cpu", policy=dict(policy))
    for prompt, output in zip(PROMPTS, together(plain, PROMPTS, **GREEDY), strict=True):
        request = Request(model_deployment=f"flexgen/{chat_model}", prompt=prompt, max_tokens=6, temperature=0.0)
        answer = client.make_request(request)
        assert answer.success, answer.error
        assert output.choices[0].logprobs is not None
        assert [one.logprob for one in output.choices[0].logprobs.content] == [
            token.logprob for token in answer.completions[0].tokens
        ]
    ENGINES.close()


def test_requests_in_flight_share_sweeps(plain: Model) -> None:
    api = plain.api
    assert isinstance(api, FlexGenAPI)
    worker = api.late.get()._worker
    before = worker.snapshot
    together(plain, [f"The quick {word}" for word in "abcdefghijklmnop"], max_tokens=5, temperature=0.0)
    assert worker.snapshot.generated_tokens - before.generated_tokens > 16
    assert worker.snapshot.sweeps - before.sweeps < 16


def test_a_conversation_is_written_by_the_models_template(chat: Model, engine: Engine) -> None:
    messages = [
        ChatMessageSystem(content="Be short."),
        ChatMessageUser(content=[ContentText(text="The quick"), ContentText(text="brown")]),
    ]
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "The quick\nbrown"}]
    (result,) = engine.run([Job(messages=turns, max_new_tokens=6)])
    assert ask(chat, messages, **GREEDY).completion == result.completions[0].text


def test_prompt_tokens_are_scored(plain: Model, chat: Model, engine: Engine) -> None:
    (result,) = engine.run([Job(prompt=PROMPTS[0], score_prompt=True)])
    found = ask(plain, PROMPTS[0], prompt_logprobs=1, max_tokens=1).choices[0].prompt_logprobs
    assert found is not None
    assert [one.logprob for one in found.content] == result.prompt_logprobs
    assert [one.token for one in found.content] == result.prompt_token_texts
    assert ask(chat, PROMPTS[0], prompt_logprobs=1, max_tokens=1).choices[0].prompt_logprobs is not None


def test_samples_follow_the_settings(plain: Model, engine: Engine) -> None:
    settings = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 6}
    (result,) = engine.run([Job(prompt=PROMPTS[0], max_new_tokens=6, temperature=0.8, top_p=0.9, num_completions=3, seed=5)])
    output = ask(plain, PROMPTS[0], num_choices=3, seed=5, **settings)
    assert [choice.message.text for choice in output.choices] == [completion.text for completion in result.completions]
    again = together(plain, [PROMPTS[1]] * 4, **settings)
    assert len({output.completion for output in again}) > 1


def test_a_stop_string_ends_the_text(plain: Model) -> None:
    whole = ask(plain, PROMPTS[0], max_tokens=20, temperature=0.0)
    assert whole.stop_reason == "max_tokens"
    stop = whole.completion[4:6]
    cut = ask(plain, PROMPTS[0], max_tokens=20, temperature=0.0, stop_seqs=[stop])
    assert cut.completion == whole.completion.partition(stop)[0]
    assert cut.stop_reason == "stop"


def test_without_a_limit_an_answer_takes_what_the_context_leaves(plain: Model, engine: Engine) -> None:
    output = ask(plain, PROMPTS[0], temperature=0.0)
    assert output.usage is not None
    assert output.stop_reason == "stop" or output.usage.total_tokens == engine.max_length


SCHEMA = ResponseSchema(name="answer", json_schema=JSONSchema(type="object"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frequency_penalty", 0.5),
        ("presence_penalty", -0.5),
        ("logit_bias", {3: 1.0}),
        ("top_k", 5),
        ("best_of", 2),
        ("response_schema", SCHEMA),
        ("prompt_logprobs", 2),
        ("reasoning_effort", "low"),
        ("batch", True),
        ("modalities", ["image"]),
        ("extra_body", {"a": 1}),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(plain: Model, name: str, value: object) -> None:
    with pytest.raises(InvalidJob, match=name):
        ask(plain, "The", **{name: value})


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (ChatMessageUser(content=[ContentImage(image="data:image/png;base64,iVBORw0KGgo=")]), "only text"),
        (ChatMessageAssistant(content=[ContentReasoning(reasoning="so")]), "only text"),
        (ChatMessageTool(content="3"), "tools"),
    ],
)
def test_messages_that_are_not_text_are_refused(chat: Model, message: Any, reason: str) -> None:
    with pytest.raises(InvalidJob, match=reason):
        asyncio.run(chat.api.generate([message], [], "none", GenerateConfig()))


def test_tools_are_refused(chat: Model) -> None:
    with pytest.raises(InvalidJob, match="tools"):
        asyncio.run(
            chat.api.generate([ChatMessageUser(content="x")], [ToolInfo(name="add", description="a")], "auto", GenerateConfig())
        )


def test_a_number_out_of_range_is_named_as_inspect_names_it(plain: Model) -> None:
    with pytest.raises(InvalidJob, match="max_tokens is 9999"):
        ask(plain, "The", max_tokens=9999)


def test_options_that_do_not_exist_are_refused_with_a_suggestion(chat_model: Path) -> None:
    with pytest.raises(FlexGenError, match=r"no option 'dtipe'. Did you mean 'dtype'"):
        get_model(f"flexgen/{chat_model}", dtipe="float32")


def test_a_model_without_template_takes_one_user_message(bos_model: Path) -> None:
    with get_model(f"flexgen/{bos_model}", device="cpu") as model:
        assert ask(model, "The quick", max_tokens=2).stop_reason in ("max_tokens", "stop")
        with pytest.raises(InvalidJob, match="system, user"):
            ask(model, [ChatMessageSystem(content="a"), ChatMessageUser(content="b")], max_tokens=2)


TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes

@task
def made():
    samples = [Sample(input=f"The {word}", target="a") for word in ("dog", "fox", "owner")]
    return Task(dataset=samples, scorer=includes(), config=GenerateConfig(max_tokens=4, temperature=0.0))
"""


def test_the_command_of_the_page_evaluates_a_task(chat_model: Path, tmp_path: Path) -> None:
    (command,) = page.commands("inspect")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(chat_model)
    (tmp_path / "my_task.py").write_text(TASK)
    program = [sys.executable, "-m", "inspect_ai"]
    finished = page.run(command, tmp_path, program, "--display", "plain", "-M", "max_memory=host=2GiB", "-M", "device=cpu")
    assert finished.returncode == 0, (finished.stdout[-2000:], finished.stderr[-2000:])
    (file,) = (tmp_path / "logs").glob("*.eval")
    log = read_eval_log(str(file))
    assert log.status == "success", log.error
    assert log.samples is not None
    assert [sample.error for sample in log.samples] == [None] * 3


def test_both_sides_of_the_benchmark_answer_alike(chat_model: Path, tmp_path: Path) -> None:
    task = {"folder": str(chat_model), "questions": str(made_questions(tmp_path)), "scratch": str(tmp_path)}
    (ours,) = inspect_side.ways("flexgen", task).values()
    found, expected = ours(6), inspect_side.ways("hf", task)["batches of 4"](6)
    assert found == expected
