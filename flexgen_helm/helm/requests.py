"""HELM requests turned into jobs, and results turned into HELM's answers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

from helm.clients.client import CachingClient
from helm.common.request import ErrorFlags, GeneratedOutput, Request, RequestResult, Token

from flexgen_helm.errors import InvalidJob, NotFinite
from flexgen_helm.types import Completion, Job, Numerics, Result


class StoredCompletion(TypedDict):
    """One completion in the form in which HELM's cache keeps it."""

    text: str
    tokens: list[tuple[str, float]]
    """Text and log-probability of each token."""
    top_logprobs: list[list[tuple[int, float]]]
    """Candidates (token id, log-probability) of each generated token; HELM's own answer has no field for them."""
    finish_reason: str


class Response(TypedDict):
    """An answer in plain types, so that a cache written today is readable by a later version."""

    completions: list[StoredCompletion]
    request_time: float
    request_datetime: int
    batch_size: int
    batch_request_time: float


@dataclass(frozen=True)
class Timing:
    """When and in what company a request was served."""

    started: float
    """Seconds since the epoch."""
    seconds: float
    """Wall-clock time of the batch."""
    batch_size: int
    """Requests that were computed together."""


_TYPES: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "embedding": bool,
    "echo_prompt": bool,
    "messages": (list, type(None)),
    "temperature": (int, float),
    "top_p": (int, float),
    "num_completions": int,
    "top_k_per_token": int,
    "max_tokens": int,
    "stop_sequences": list,
    "random": (str, type(None)),
}
"""Types that HELM declares for the fields of a request. HELM does not check the values of run entries and scenarios."""

MOST_BITS = 63
"""Of an integer in a request; Python cannot even write one of some thousand digits."""

_HELM_WORDS = {"max_new_tokens": "max_tokens", "top_logprobs": "top_k_per_token", "seed": "`random`", "jobs": "requests"}
"""HELM's words for the fields of a job that messages name."""

Refusal = tuple[Callable[[Request], bool], str]

REFUSALS: tuple[Refusal, ...] = (
    (
        lambda request: request.embedding,
        "`embedding`: a causal language model answers with text; use the deployment of an embedding model",
    ),
    (
        lambda request: request.messages is not None and bool(request.prompt),
        "`messages` beside a `prompt`: which of them to answer is unknown; send one of them",
    ),
    (
        lambda request: request.messages is not None and request.echo_prompt,
        "`echo_prompt` with `messages`, whose tokens are in part the chat template's: send the text to score as `prompt`",
    ),
    (
        lambda request: request.multimodal_prompt is not None or request.image_generation_parameters is not None,
        "multimodal input or output: only text is supported; use the deployment of a multimodal model",
    ),
    (
        lambda request: request.response_format is not None,
        "`response_format`: constrained decoding is not supported; ask for the format in the prompt",
    ),
    (
        lambda request: request.presence_penalty != 0 or request.frequency_penalty != 0,
        "`presence_penalty` or `frequency_penalty` other than 0: answers come from the unchanged model; set both to 0",
    ),
    (
        lambda request: request.echo_prompt and request.max_tokens > 0,
        "`echo_prompt` with `max_tokens` above 0: send one request with echo_prompt and max_tokens=0 for the prompt "
        "and one without echo_prompt for the completion",
    ),
    (
        lambda request: not request.echo_prompt and request.max_tokens == 0,
        "`max_tokens=0` without `echo_prompt`, which asks for nothing: set echo_prompt to score the prompt, or raise "
        "max_tokens",
    ),
)


def stable_seed(random: str | None) -> int | None:
    """Return a seed that depends on HELM's ``random`` field only, on every machine and in every process.

    Args:
        random: Any string, or None for HELM's default.

    Returns:
        A number in [0, 2**63), or None.
    """
    if random is None:
        return None
    return int.from_bytes(hashlib.sha256(random.encode(errors="surrogatepass")).digest()[:8], "big") >> 1


def to_job(request: Request) -> Job:
    """Convert a request.

    ``top_k_per_token`` asks HELM's providers for that many candidates per token. It never restricts sampling.

    Raises:
        InvalidJob: The request has a field that cannot be honoured.
    """
    for name, declared in _TYPES.items():
        value = getattr(request, name)
        # True is an integer to Python, and no number of anything.
        if not isinstance(value, declared) or (isinstance(value, bool) and declared is not bool):
            raise InvalidJob(
                f"`{name}` of this request is of type {type(value).__name__}, which is not what HELM declares it to be. "
                "Correct the run entry or the scenario that it comes from."
            )
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise InvalidJob(
                f"`{name}` of this request is an integer of {value.bit_length()} bits, which no computation and no file holds. "
                "Correct the run entry or the scenario that it comes from."
            )
    for applies, explanation in REFUSALS:
        if applies(request):
            raise InvalidJob(f"This request cannot be served because of {explanation}.")
    return Job(
        prompt=request.prompt if request.messages is None else None,
        messages=request.messages,
        max_new_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        num_completions=request.num_completions,
        seed=stable_seed(request.random),
        stop=tuple(request.stop_sequences),
        score_prompt=request.echo_prompt,
        # One candidate is the default of every request and is what greedy decoding returns anyway.
        top_logprobs=0 if request.top_k_per_token == 1 or request.max_tokens == 0 else request.top_k_per_token,
    )


def to_response(request: Request, result: Result, timing: Timing) -> Response:
    """Convert the result of ``to_job(request)``.

    Tokens are exactly the prompt's when it is echoed, and end before the stop or end token otherwise, because
    ``multiple_choice_separate`` sums the last log-probabilities and HELM's metrics expect no special tokens.

    Raises:
        FlexGenError: The job was refused, or a number of its result is not finite.
    """
    if result.error is not None:
        raise result.error
    if request.echo_prompt:
        completions = [_stored_prompt(request, result)] * request.num_completions
    else:
        completions = [_stored_completion(request, completion) for completion in result.completions]
    if not all(map(_is_finite, completions)):
        raise NotFinite("The answer holds NaN or infinity, so it is neither kept nor scored. Use bfloat16 or float32 (dtype).")
    return Response(
        completions=completions,
        request_time=timing.seconds / timing.batch_size,
        request_datetime=int(timing.started),
        batch_size=timing.batch_size,
        batch_request_time=timing.seconds,
    )


def checked(response: Any) -> Response | None:
    """Return a stored answer; None if it has another form, or a number in it is not finite, as in those of other versions."""
    with suppress(KeyError, TypeError, ValueError):
        if _has(response, _RESPONSE) and all(map(_is_whole, response["completions"])):
            whole: Response = response
            return whole
    return None


_NUMBER = (int, float)
_RESPONSE = {"completions": list, **dict.fromkeys(("request_time", "batch_request_time"), _NUMBER)} | dict.fromkeys(
    ("request_datetime", "batch_size"), int
)
_COMPLETION = {"text": str, "tokens": list, "top_logprobs": list, "finish_reason": str}


def _has(content: Any, fields: Mapping[str, Any]) -> bool:
    return isinstance(content, dict) and all(isinstance(content[name], kind) for name, kind in fields.items())


def _is_whole(completion: Any) -> bool:
    return (
        _has(completion, _COMPLETION)
        and all(isinstance(text, str) for text, _ in completion["tokens"])
        and all(isinstance(token_id, int) for step in completion["top_logprobs"] for token_id, _ in step)
        and _is_finite(completion)
    )


def _is_finite(completion: StoredCompletion) -> bool:
    candidates = (logprob for step in completion["top_logprobs"] for _, logprob in step)
    return all(map(math.isfinite, (logprob for _, logprob in completion["tokens"]))) and all(map(math.isfinite, candidates))


def _stored_prompt(request: Request, result: Result) -> StoredCompletion:
    tokens = list(zip(result.prompt_token_texts, result.prompt_logprobs or [], strict=True))
    return StoredCompletion(text=request.prompt, tokens=tokens, top_logprobs=[], finish_reason="length")


def _stored_completion(request: Request, completion: Completion) -> StoredCompletion:
    tokens = list(zip(completion.token_texts, completion.logprobs, strict=True))
    return StoredCompletion(
        text=completion.text,
        tokens=tokens[: completion.num_text_tokens],
        top_logprobs=[[(token_id, logprob) for token_id, logprob in step] for step in completion.top_logprobs],
        finish_reason=completion.finish_reason,
    )


def to_request_result(response: Response, *, cached: bool) -> RequestResult:
    """Convert a computed or cached answer to what HELM's executor expects."""
    return RequestResult(
        success=True,
        cached=cached,
        completions=[_generated_output(completion) for completion in response["completions"]],
        embedding=[],
        request_time=response["request_time"],
        request_datetime=response["request_datetime"],
        batch_size=response["batch_size"],
        batch_request_time=response["batch_request_time"],
    )


def _generated_output(completion: StoredCompletion) -> GeneratedOutput:
    tokens = [Token(text, logprob) for text, logprob in completion["tokens"]]
    output = GeneratedOutput(completion["text"], sum(token.logprob for token in tokens), tokens)
    return replace(output, finish_reason={"reason": completion["finish_reason"]})


def failure(error: Exception) -> RequestResult:
    """Return an answer that fails the run at once.

    HELM repeats a failed request for 150 seconds unless it is told that the failure is permanent, which it is: the
    same request meets the same model again.
    """
    message = error.in_words(_HELM_WORDS) if isinstance(error, InvalidJob) else str(error)
    return RequestResult(
        success=False,
        cached=False,
        completions=[],
        embedding=[],
        error=f"{type(error).__name__}: {message}",
        error_flags=ErrorFlags(is_retriable=False, is_fatal=True),
    )


def cache_key(request: Request, job: Job, numerics: Numerics) -> Mapping[str, Any]:
    """Return what an answer depends on: the job and the numerics of the engine, not the placement of its weights.

    Every job has a key, also one that the engine will refuse.
    """
    fields = json.loads(json.dumps(vars(job), default=repr, skipkeys=True))
    key: Mapping[str, Any] = CachingClient.make_cache_key({"job": fields, "numerics": asdict(numerics)}, request)
    return key
