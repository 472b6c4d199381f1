"""Check a job before it runs, and tokenise its prompt."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from flexgen_helm.errors import InvalidJob
from flexgen_helm.generation.chat import render
from flexgen_helm.generation.sampling import GREEDY_TEMPERATURE
from flexgen_helm.types import Job

MAX_COMPLETIONS = 4096
"""Largest number of completions of one job. Each of them takes memory from the start."""


@dataclass(frozen=True)
class PreparedJob:
    """A job that was checked, and the token ids of its input."""

    job: Job
    """The job as it was given, with ``stop`` as a tuple."""
    input_ids: tuple[int, ...]
    """Token ids of the model's input: the prompt's, after those that the tokenizer adds before a text, such as BOS."""
    num_added: int
    """Number of token ids at the start of ``input_ids`` that the tokenizer added."""

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Token ids of the prompt itself, which the result shows."""
        return self.input_ids[self.num_added :]

    @property
    def is_greedy(self) -> bool:
        """Whether each generated token is the most likely one, so that no random numbers are used."""
        return self.job.temperature <= GREEDY_TEMPERATURE


def prepare(
    job: Job,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    vocab_size: int,
    length_reason: str = "the model's own limit",
) -> PreparedJob:
    """Check a job and tokenise its prompt.

    A ``prompt`` is tokenised without special tokens. Then the tokens that the tokenizer adds before a text are put before it,
    unless the prompt begins with them or the context has no room for all of them. ``messages`` are written by the model's chat
    template, without added tokens. ``token_ids`` are not changed.

    Args:
        job: The job as the user gave it.
        tokenizer: The model's tokenizer, or None if it has none.
        max_length: Largest number of tokens of a job, input and new tokens together.
        vocab_size: Number of token ids that the model knows.
        length_reason: The reason for ``max_length``, for messages.

    Raises:
        InvalidJob: If the job cannot be run. The message says what is wrong, why, and what to do.
    """
    _check_limits(job, vocab_size)
    job = _with_checked_stop(job, tokenizer)
    prompt_ids = _prompt_ids(job, tokenizer, vocab_size)
    needed = len(prompt_ids) + job.max_new_tokens
    if needed > max_length:
        raise _too_long(job, len(prompt_ids), max_length, length_reason)
    added = added_prefix(tokenizer) if job.prompt is not None and tokenizer is not None else ()
    if prompt_ids[: len(added)] == added or needed + len(added) > max_length:
        added = ()
    _check_known(added, vocab_size, "The tokenizer")
    return PreparedJob(job, added + prompt_ids, len(added))


def _too_long(job: Job, length: int, max_length: int, reason: str) -> InvalidJob:
    return InvalidJob(
        "The prompt has {length} tokens and {max_new_tokens} is {new}, together {needed}, but the model's context holds "
        "{context} tokens ({reason}). Shorten the prompt or lower {max_new_tokens}.",
        length=length,
        new=job.max_new_tokens,
        needed=length + job.max_new_tokens,
        context=max_length,
        reason=reason,
    )


def _check_limits(job: Job, vocab_size: int) -> None:
    _check_int("max_new_tokens", job.max_new_tokens, at_least=0)
    _check_int("num_completions", job.num_completions, at_least=1)
    if job.num_completions > MAX_COMPLETIONS:
        raise InvalidJob(
            "{num_completions} is {count}, but at most {limit} are allowed. Give several {jobs} that differ in {seed}.",
            count=job.num_completions,
            limit=MAX_COMPLETIONS,
        )
    _check_int("top_logprobs", job.top_logprobs, at_least=0)
    if job.top_logprobs > vocab_size:
        raise InvalidJob(
            "{top_logprobs} is {count}, but the model has {vocab_size} tokens. Ask for that many at most.",
            count=job.top_logprobs,
            vocab_size=vocab_size,
        )
    if job.seed is not None and not _is_int(job.seed):
        raise InvalidJob(f"seed must be an integer or None, not {job.seed!r}.")
    if not _is_number(job.temperature) or not 0 <= job.temperature < math.inf:
        raise InvalidJob(
            f"temperature must be a finite number of at least 0, not {job.temperature!r}; 0 takes the most likely token."
        )
    if not _is_number(job.top_p) or not 0 < job.top_p <= 1:
        raise InvalidJob(f"top_p must be above 0 and at most 1, not {job.top_p!r}; 1 is no limit.")
    if job.max_new_tokens == 0 and not job.score_prompt:
        raise InvalidJob(
            "max_new_tokens is 0 and score_prompt is False, so nothing is asked. Give max_new_tokens of at least 1, or "
            "score_prompt=True for the prompt's log-probabilities."
        )
    if job.max_new_tokens == 0 and job.top_logprobs:
        raise InvalidJob(
            f"top_logprobs is {job.top_logprobs} and max_new_tokens is 0, but only generated tokens have candidates. Set"
            " top_logprobs=0, or max_new_tokens=1 for the candidates of the token after the prompt."
        )
    if job.messages is not None and job.score_prompt:
        raise InvalidJob(
            "score_prompt is set for messages, whose tokens are in part the chat template's. Give the text to score as prompt."
        )


def _with_checked_stop(job: Job, tokenizer: PreTrainedTokenizerBase | None) -> Job:
    stop = job.stop
    if not isinstance(stop, tuple | list) or not all(isinstance(text, str) and text for text in stop):
        raise InvalidJob(
            f"stop is {stop!r}, but it must be a tuple of strings, none of them empty (every text begins with an empty "
            'one). Write stop=("\\n",) for one stop string and stop=() for none.'
        )
    if stop and tokenizer is None:
        raise InvalidJob(
            f"stop is {stop!r}, but this model folder has no tokenizer, so there is no text to find it in. Add the "
            "tokenizer's files to the folder, or stop by max_new_tokens."
        )
    return dataclasses.replace(job, stop=tuple(stop))


def _prompt_ids(job: Job, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> tuple[int, ...]:
    given = [name for name in ("prompt", "token_ids", "messages") if getattr(job, name) is not None]
    if len(given) != 1:
        raise InvalidJob(
            f"A job needs one of prompt, token_ids and messages, but got {' and '.join(given) or 'none of them'}. "
            "Give exactly one."
        )
    token_ids = _checked_token_ids(job.token_ids) if job.token_ids is not None else _tokenised(job, tokenizer)
    _check_known(token_ids, vocab_size, "The tokenizer" if job.token_ids is None else "token_ids")
    return token_ids


def _check_known(token_ids: Sequence[int], vocab_size: int, source: str) -> None:
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
    if wrong is not None:
        raise InvalidJob(
            f"{source} gave token id {wrong}, but the model knows only the ids 0 to {vocab_size - 1}. "
            "Use the tokenizer that belongs to the model."
        )


def _checked_token_ids(token_ids: Sequence[int]) -> tuple[int, ...]:
    try:
        checked = tuple(map(operator.index, token_ids))
    except TypeError as error:
        raise InvalidJob(
            f"token_ids hold something that is no integer ({error}). Give a sequence of token ids, "
            'such as tokenizer(text)["input_ids"].'
        ) from None
    if not checked:
        raise InvalidJob("token_ids are empty, so there is nothing to continue. Give at least one, for example BOS.")
    return checked


def _tokenised(job: Job, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    if tokenizer is None:
        raise InvalidJob(
            "The job has text, but this model folder has no tokenizer to read it with. Give token_ids, or add the tokenizer's "
            "files to the folder."
        )
    text = job.prompt if job.messages is None else render(job.messages, tokenizer)
    if not isinstance(text, str):
        raise InvalidJob(f"prompt is of type {type(text).__name__}, but must be a string. Give text, or token_ids.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidJob(
            f"The prompt holds half of a surrogate pair (position {error.start}), which is no character and has no "
            'UTF-8 form. Clean it first: prompt.encode("utf-8", "replace").decode().'
        ) from None
    token_ids = tuple(tokenizer.encode(text, add_special_tokens=False, truncation=False, verbose=False))
    if not token_ids:
        raise InvalidJob("The prompt is empty, so there is nothing to continue. Give a prompt of at least one token.")
    return token_ids


@functools.lru_cache(maxsize=1)  # Not computed again for every job. Only the last tokenizer is kept alive.
def added_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the token ids that a tokenizer adds before a text: BOS, ``</s>`` in XGLM, ``[gMASK]<sop>`` in GLM, often none.

    Tokens that it adds after a text, such as ``[SEP]`` in BERT, are never used: they end a text, but a prompt is continued.
    """
    alone, whole = (tokenizer.encode("x", add_special_tokens=added, verbose=False) for added in (False, True))
    starts = (start for start in range(len(whole)) if whole[start : start + len(alone)] == alone)
    return tuple(whole[: next(starts, 0)])


def _check_int(name: str, value: object, *, at_least: int) -> None:
    if not _is_int(value) or value < at_least:  # type: ignore[operator]
        raise InvalidJob(
            f"{{{name}}} must be an integer of at least {{at_least}}, not {{value!r}}.", at_least=at_least, value=value
        )


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        float(value)
    except OverflowError:  # an integer may be larger than every float
        return False
    return True
