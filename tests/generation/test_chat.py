"""Chat messages against the library's own ``apply_chat_template`` and ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flexgen_helm import Engine
from flexgen_helm.errors import InvalidJob
from flexgen_helm.generation.prepare import PreparedJob, prepare
from flexgen_helm.types import Job
from tests.reference import Agreement, Reference
from tests.text_models import ALTERNATING, CHATML, save_llama
from tests.tiny_tokenizers import byte_level, metaspace_bpe
from tests.workbench import POLICY

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "  spaces \n"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "naïve 中文 😀"},
    ],
    # Special tokens in the words of a user are special tokens, as in the library.
    [{"role": "user", "content": "<s>Hello</s><|im_end|>"}],
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *CONVERSATIONS[0]]


def with_template(template: str | None, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = template
    return tokenizer


def library_ids(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    encoding: Any = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    return list(encoding["input_ids"])


TOKENIZERS = {
    "ChatML": with_template(CHATML, byte_level()),
    "ChatML, a tokenizer that adds BOS": with_template(CHATML, byte_level(adds_bos=True)),
    "a template that writes BOS": with_template(ALTERNATING, byte_level(adds_bos=True)),
    "SentencePiece": with_template(ALTERNATING, metaspace_bpe(adds_bos=True)),
}
CHATTY = TOKENIZERS["ChatML"]


def prepared(messages: Any, tokenizer: PreTrainedTokenizerBase | None = CHATTY, **options: Any) -> PreparedJob:
    job = Job(messages=messages, **options)
    return prepare(job, tokenizer=tokenizer, max_length=500, vocab_size=len(tokenizer or CHATTY))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_input_is_what_the_library_makes_of_the_messages(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    conversations = [*CONVERSATIONS, SYSTEM] if tokenizer.chat_template == CHATML else CONVERSATIONS
    for messages in conversations:
        expected = library_ids(messages, tokenizer)
        result = prepared(messages, tokenizer)
        assert list(result.input_ids) == expected
        assert result.num_added == 0
        # The template's own, or none: never a second one.
        starts = 1 if tokenizer.chat_template == ALTERNATING else 0
        assert expected[:2].count(tokenizer.bos_token_id) == starts


def test_a_prompt_is_never_given_to_the_template() -> None:
    result = prepare(Job(prompt="Hello"), tokenizer=CHATTY, max_length=500, vocab_size=len(CHATTY))
    assert list(result.input_ids) == CHATTY("Hello", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("messages", [CONVERSATIONS[0], SYSTEM])
def test_answers_equal_generate(messages: list[dict[str, str]], tmp_path: Path) -> None:
    folder = save_llama(CHATTY, tmp_path)
    job = Job(messages=messages, max_new_tokens=20, top_logprobs=3)
    with Engine.from_pretrained(str(folder), device="cpu", policy=POLICY) as engine:
        (result,) = engine.run([job])
    ids = library_ids(messages, CHATTY)
    agreement = Agreement()
    agreement.add(Job(token_ids=ids, max_new_tokens=20, top_logprobs=3), result, Reference(folder))
    assert (agreement.failures, agreement.tokens) == ([], 20)
    assert result.completions[0].text == CHATTY.decode(result.completions[0].token_ids, skip_special_tokens=True)


@pytest.mark.slow
def test_a_real_model_answers_as_in_generate(real_model: Path, tmp_path: Path) -> None:
    """SmolLM2 was tuned with this template, which its folder here lacks."""
    for file in real_model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    follow_up = [*question, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Italy?"}]
    with Engine.from_pretrained(str(tmp_path), device="cpu", dtype="float32") as engine:
        results = engine.run([Job(messages=messages, max_new_tokens=24) for messages in (question, follow_up)])
    tokenizer, agreement, reference = AutoTokenizer.from_pretrained(tmp_path), Agreement(), Reference(tmp_path)
    for messages, result in zip((question, follow_up), results, strict=True):
        agreement.add(Job(token_ids=library_ids(messages, tokenizer), max_new_tokens=24), result, reference)
        assert result.completions[0].finish_reason == "endoftext"
    assert agreement.failures == []


INVALID: dict[str, tuple[Any, str]] = {
    "none": ([], r"messages are \[\]"),
    "a string": ("Hello", "messages are 'Hello'"),
    "one message": ({"role": "user", "content": "Hello"}, "messages are {"),
    "text in place of a message": (["Hello"], "Message 0 is of type str"),
    "no content": ([{"role": "user"}], r"Message 0 is \['role'\]"),
    "another key": ([{"role": "user", "content": "Hello", "name": "Ann"}], r"Message 0 is \['content', 'name', 'role'\]"),
    "keys of any type": ([{1: "user", ("role",): "Hello"}], "Message 0 is"),
    "unknown role": ([*SYSTEM, {"role": "tool", "content": "4"}], "Message 2 has the role 'tool'.*system, user, assistant"),
    "role of another type": ([{"role": ["user"], "content": "Hello"}], r"the role \['user'\]"),
    "an image": ([{"role": "user", "content": [{"type": "image"}]}], "message 0 is of type list, but only text"),
    "half a surrogate pair": ([{"role": "user", "content": "a\ud800"}], "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", INVALID)
def test_malformed_messages_are_refused(name: str) -> None:
    messages, message = INVALID[name]
    with pytest.raises(InvalidJob, match=message):
        prepared(messages)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, SYSTEM, "has no chat template.*give a prompt"),
        (ALTERNATING, SYSTEM, "refuses these messages: Conversation roles must alternate"),
        ("{{ messages[0].content + 1 }}", SYSTEM, "refuses these messages: "),
        ("{% for", SYSTEM, "refuses these messages: "),
        # It writes nothing.
        ("{# #}", SYSTEM, "The prompt is empty"),
    ],
)
def test_what_the_model_cannot_write_is_refused(template: str | None, messages: Any, message: str) -> None:
    with pytest.raises(InvalidJob, match=message):
        prepared(messages, with_template(template, byte_level()))


def test_messages_are_not_scored_and_stand_alone() -> None:
    with pytest.raises(InvalidJob, match="score_prompt is set for messages"):
        prepared(SYSTEM, score_prompt=True)
    with pytest.raises(InvalidJob, match="but got prompt and messages"):
        prepared(SYSTEM, prompt="Hello")
    with pytest.raises(InvalidJob, match="no tokenizer"):
        prepared(SYSTEM, None)


def test_a_conversation_beyond_the_context_is_refused() -> None:
    with pytest.raises(InvalidJob, match="context holds 500"):
        prepared([{"role": "user", "content": "word " * 200}], max_new_tokens=100)
