"""Turn chat messages into a prompt, with the chat template of the model's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from flexgen_helm.errors import InvalidJob

ROLES = ("system", "user", "assistant")
"""Roles that a message may have."""


def render(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a conversation as text in the model's chat format, ending with the beginning of the assistant's next turn.

    Args:
        messages: The turns, each a mapping with the keys ``role`` and ``content``.
        tokenizer: The model's tokenizer. Its template writes special tokens as text, including BOS if the model expects it.

    Raises:
        InvalidJob: If ``messages`` are malformed, or the tokenizer has no chat template, or its template refuses them.
    """
    turns = _checked(messages)
    if not tokenizer.chat_template:
        raise InvalidJob(
            "The job has messages, but this model's tokenizer has no chat template, so it is unknown how to write them. "
            "Use a model that was tuned for chat, or give a prompt."
        )
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # A template is a program, which may raise anything.
        raise InvalidJob(
            f"The model's chat template refuses these messages: {error}. Many templates want turns of user and assistant that "
            "alternate, begin with the user's and have no system message. Give messages that this model knows."
        ) from error
    assert isinstance(text, str)
    return text


def _checked(messages: object) -> list[dict[str, str]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidJob(
            f"messages are {messages!r}, but a conversation has at least one turn. Give a list such as "
            '[{"role": "user", "content": "Hello"}].'
        )
    return [_checked_turn(number, message) for number, message in enumerate(messages)]


def _checked_turn(number: int, message: object) -> dict[str, str]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        given = sorted(map(str, message)) if isinstance(message, Mapping) else f"of type {type(message).__name__}"
        raise InvalidJob(
            f"Message {number} is {given}, but a turn is a mapping with `role` and `content` and nothing else: what a template "
            "does with other keys differs from model to model. Give these two."
        )
    if message["role"] not in ROLES:
        raise InvalidJob(f"Message {number} has the role {message['role']!r}. Give one of {', '.join(ROLES)}.")
    if not isinstance(message["content"], str):
        raise InvalidJob(
            f"The content of message {number} is of type {type(message['content']).__name__}, but only text is supported. "
            "Give a string."
        )
    return dict(message)
