"""Requests of Inspect turned into jobs, and results turned into Inspect's outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentText,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelOutput,
    ModelUsage,
    StopReason,
    TopLogprob,
)
from inspect_ai.tool import ToolInfo
from transformers import PreTrainedTokenizerBase

from flexgen_helm.errors import InvalidJob, NotFinite
from flexgen_helm.generation.chat import render
from flexgen_helm.generation.prepare import prepare
from flexgen_helm.generation.sampling import GREEDY_TEMPERATURE
from flexgen_helm.generation.vocabulary import Vocabulary
from flexgen_helm.types import Completion, FinishReason, Job, Result, TokenLogprob

DEFAULT_NEW_TOKENS = 2048
"""New tokens where a task names no number, as in Inspect's Hugging Face provider, and at most what the context leaves."""
WORDS = {"max_new_tokens": "max_tokens", "num_completions": "num_choices", "jobs": "requests"}
"""Inspect's words for the fields of a job that messages name."""
STOP_REASONS: dict[FinishReason, StopReason] = {"length": "max_tokens", "stop": "stop", "endoftext": "stop"}
UNCHANGED = "answers come from the unchanged model; leave it out"
HOSTED = "it is for hosted models; leave it out"
REFUSED: dict[str, str] = {
    "frequency_penalty": UNCHANGED,
    "presence_penalty": UNCHANGED,
    "logit_bias": UNCHANGED,
    "top_k": "sampling is cut by top_p alone; leave it out",
    "best_of": "ask for num_choices and choose by their log-probabilities",
    "response_schema": "constrained decoding is not supported; ask for the format in the prompt",
    "modalities": "only text is supported",
    "batch": "requests are computed together without it; leave it out, and raise max_connections",
    **dict.fromkeys(("extra_body", "extra_headers", "fallback_models"), HOSTED),
    **dict.fromkeys(("verbosity", "effort", "reasoning_effort", "reasoning_mode", "reasoning_tokens"), HOSTED),
    "reasoning_summary": HOSTED,
}
"""Settings that are not served, and what to do instead."""
NEUTRAL: dict[str, object] = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "best_of": 1, "batch": False}
"""Values of these settings that change nothing."""


def refuse(config: GenerateConfig, tools: Sequence[ToolInfo]) -> None:
    """Refuse what cannot be honoured.

    Raises:
        InvalidJob: If a setting is not served, or the model is offered tools.
    """
    if tools:
        raise InvalidJob(
            f"The model is offered tools ({', '.join(tool.name for tool in tools)}), which are not supported. Use a task "
            "without tools, or Inspect's `hf` provider."
        )
    for name, remedy in REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value != NEUTRAL.get(name) and value not in ({}, []):
            raise InvalidJob(f"The setting `{name}` ({value!r}) is not supported: {remedy}.")
    if config.prompt_logprobs is not None and config.prompt_logprobs > 1:
        raise InvalidJob("prompt_logprobs is above 1, but prompt tokens have no other candidates. Set prompt_logprobs=1.")


def turns_of(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Return a conversation as role and text of each turn.

    Raises:
        InvalidJob: If a message holds anything but text, or belongs to a tool.
    """
    return [{"role": _role(message), "content": _text(message)} for message in messages]


def _role(message: ChatMessage) -> str:
    if message.role == "tool" or (isinstance(message, ChatMessageAssistant) and message.tool_calls):
        raise InvalidJob("The conversation calls tools, which are not supported. Use a task without tools.")
    return str(message.role)


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    other = next((part for part in message.content if not isinstance(part, ContentText)), None)
    if other is not None:
        raise InvalidJob(f"A message holds content of the kind `{other.type}`, but only text is supported.")
    return "\n".join(part.text for part in message.content if isinstance(part, ContentText))


class Requests:
    """Makes the jobs of one model. Without a seed, a request that comes again gets other samples, as epochs expect."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, use_chat_template: bool) -> None:
        """Hold what all requests share.

        Args:
            tokenizer: The model's tokenizer.
            max_length: Tokens of prompt and answer together.
            use_chat_template: Whether the model's chat template writes the prompt. Otherwise it is the text of the one message.
        """
        self._tokenizer, self._max_length, self._use_template = tokenizer, max_length, use_chat_template
        self._seen: Counter[int] = Counter()

    def job(self, messages: Sequence[ChatMessage], config: GenerateConfig) -> Job:
        """Return the job of a request.

        Raises:
            InvalidJob: If it cannot be served.
        """
        turns = turns_of(messages)
        job = Job(
            messages=turns if self._use_template else None,
            prompt=None if self._use_template else _only_text(turns),
            max_new_tokens=1 if config.max_tokens is None else config.max_tokens,
            temperature=1.0 if config.temperature is None else config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            num_completions=1 if config.num_choices is None else config.num_choices,
            stop=tuple(config.stop_seqs or ()),
            top_logprobs=config.top_logprobs or 0,
        )
        if config.prompt_logprobs is not None:
            job = self._scored(job)
        if config.max_tokens is None:
            job = replace(job, max_new_tokens=self._room(job))
        return replace(job, seed=self._repetition(job) if config.seed is None else config.seed)

    def _scored(self, job: Job) -> Job:
        """Let the prompt's tokens be scored. Those of a chat template are tokens like any other here."""
        if job.messages is None:
            return replace(job, score_prompt=True)
        text = render(job.messages, self._tokenizer)
        token_ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return replace(job, messages=None, token_ids=tuple(token_ids), score_prompt=True)

    def _room(self, job: Job) -> int:
        known = prepare(job, tokenizer=self._tokenizer, max_length=self._max_length, vocab_size=len(self._tokenizer))
        return min(DEFAULT_NEW_TOKENS, self._max_length - len(known.input_ids))

    def _repetition(self, job: Job) -> int:
        if job.temperature <= GREEDY_TEMPERATURE:
            return 0
        key = hash(repr(job))
        self._seen[key] += 1
        return self._seen[key] - 1


def _only_text(turns: Sequence[dict[str, str]]) -> str:
    if len(turns) != 1 or turns[0]["role"] != "user":
        roles = ", ".join(turn["role"] for turn in turns)
        raise InvalidJob(
            f"The conversation has the turns {roles}, but without a chat template the prompt is the text of one user message. "
            "Use a task with one, without system message, or a model with a chat template."
        )
    return turns[0]["content"]


def to_output(model: str, result: Result, config: GenerateConfig, vocabulary: Vocabulary, seconds: float) -> ModelOutput:
    """Return the output for a result.

    Args:
        model: The model's name.
        result: The result.
        config: The settings of the request, which say which log-probabilities are wanted.
        vocabulary: The tokenizer's vocabulary.
        seconds: Wall-clock time of the request.

    Raises:
        FlexGenError: If the job was not served.
    """
    if result.error is not None:
        raise result.error
    wanted = bool(config.logprobs or config.top_logprobs)
    prompt = _prompt_logprobs(result, vocabulary) if config.prompt_logprobs is not None else None
    choices = [
        ChatCompletionChoice(
            message=ChatMessageAssistant(content=completion.text, model=model, source="generate"),
            stop_reason=STOP_REASONS[completion.finish_reason],
            logprobs=_logprobs(completion, vocabulary) if wanted else None,
            prompt_logprobs=prompt,
        )
        for completion in result.completions
    ]
    asked = len(result.prompt_token_ids)
    generated = sum(len(completion.token_ids) for completion in result.completions)
    usage = ModelUsage(input_tokens=asked, output_tokens=generated, total_tokens=asked + generated)
    return ModelOutput(model=model, choices=choices, usage=usage, time=seconds)


def _logprobs(completion: Completion, vocabulary: Vocabulary) -> Logprobs:
    """Return the tokens of the text; neither an end token nor a stop string's is among them, as in HELM's answers."""
    kept = completion.num_text_tokens
    steps = zip(completion.token_ids[:kept], completion.logprobs[:kept], completion.token_texts[:kept], strict=True)
    tops = completion.top_logprobs[:kept] or [[]] * kept
    return Logprobs(
        content=[
            Logprob(token=text, logprob=logprob, bytes=list(vocabulary.piece(token_id)), top_logprobs=_top(top, vocabulary))
            for (token_id, logprob, text), top in zip(steps, tops, strict=True)
        ]
    )


def _top(candidates: Sequence[TokenLogprob], vocabulary: Vocabulary) -> list[TopLogprob] | None:
    found = [
        TopLogprob(token=vocabulary.text(token_id), logprob=logprob, bytes=list(vocabulary.piece(token_id)))
        for token_id, logprob in candidates
    ]
    return found or None


def _prompt_logprobs(result: Result, vocabulary: Vocabulary) -> Logprobs:
    found = zip(result.prompt_token_ids, result.prompt_token_texts, result.prompt_logprobs or [], strict=True)
    return Logprobs(
        content=[
            Logprob(token=text, logprob=logprob, bytes=list(vocabulary.piece(token_id))) for token_id, text, logprob in found
        ]
    )


def in_inspects_words(error: InvalidJob) -> InvalidJob:
    """Return an error whose message names the fields of a request by Inspect's words."""
    made: Callable[[Any], InvalidJob] = NotFinite if isinstance(error, NotFinite) else InvalidJob
    return made(error.in_words(WORDS))
