"""Requests and answers of the two sides, and what HELM's log says of the time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgen_helm.errors import FlexGenError
from flexgen_helm.reports.contents import Request
from flexgen_helm.reports.runs import only_run
from flexgen_helm.schedule.tree import common_prefix_length

LOADING = re.compile(r"^(?P<head>.*? INFO +)Loading .* for HELM model .*\{$")
SECONDS = re.compile(r"\} \[(?:(\d+)h)?(?:(\d+)m)?([\d.]+)s\]$")


@dataclass(frozen=True)
class Asked:
    """A request, the same for both sides."""

    prompt: str
    max_tokens: int
    stop: tuple[str, ...]
    scores_prompt: bool
    """Whether the log-probabilities of the prompt are the answer."""


@dataclass(frozen=True)
class Answer:
    """The answer of one side."""

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None
    seconds: float
    """HELM's ``request_time``: of the engine's, an equal part of the time of all."""


def read_answers(suite: Path) -> list[tuple[Asked, Answer]]:
    """Read the only run of a suite, in HELM's order.

    Raises:
        CorruptFile: There is not one run, or it cannot be read.
    """
    return [(_asked(request), _answer(request)) for request in only_run(suite).requests()]


def _asked(request: Request) -> Asked:
    asked = request.asked
    return Asked(request.prompt, asked["max_tokens"], tuple(asked["stop_sequences"]), asked["echo_prompt"])


def _answer(request: Request) -> Answer:
    (completion,) = request.completions
    return Answer(
        text=completion.text,
        tokens=tuple(token.text for token in completion.tokens),
        logprobs=tuple(_known(token.logprob) for token in completion.tokens),
        finish_reason=completion.finish_reason,
        seconds=_known(request.seconds),
    )


def _known(value: float | None) -> float:
    if value is None:
        raise FlexGenError("A client reported no log-probability or no time, so the sides do not compare. Use clients that do.")
    return value


def loading_seconds(log: str) -> float:
    """Seconds for which HELM's client loaded the model, which is part of its first request's time.

    Raises:
        FlexGenError: The log does not say.
    """
    lines = iter(log.splitlines())
    for line in lines:
        begin = LOADING.match(line)
        if begin is None:
            continue
        # The end of a block of HELM's log stands as far to the right as its beginning.
        column = len(begin["head"])
        for end in lines:
            seconds = SECONDS.search(end)
            if seconds is not None and end.find("}") == column:
                hours, minutes, rest = seconds.groups(default="0")
                return 3600 * int(hours) + 60 * int(minutes) + float(rest)
    raise FlexGenError("HELM's log does not say how long its client loaded the model. Keep helm-run's default log format.")


def count_tokens(prompts: Iterable[Sequence[int]]) -> tuple[int, int]:
    """Count the tokens of all prompts, and those that are left when every distinct prefix is computed once."""
    asked = computed = 0
    previous: Sequence[int] = ()
    for prompt in sorted(map(tuple, prompts)):
        asked += len(prompt)
        computed += len(prompt) - common_prefix_length(previous, prompt)
        previous = prompt
    return asked, computed
