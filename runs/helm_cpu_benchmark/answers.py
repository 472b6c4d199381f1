"""Requests and answers, read from the files that HELM leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_helm.errors import FlexGenError
from flexgen_helm.schedule.tree import common_prefix_length

LOADING = re.compile(r"^(?P<head>.*? INFO +)Loading .* for HELM model .*\{$")
SECONDS = re.compile(r"\} \[(?:(\d+)h)?(?:(\d+)m)?([\d.]+)s\]$")


@dataclass(frozen=True)
class Asked:
    """What both sides were asked."""

    prompt: str
    max_tokens: int
    stop: tuple[str, ...]
    scores_prompt: bool
    """Whether the log-probabilities of the prompt are the answer."""


@dataclass(frozen=True)
class Answer:
    """What one side answered."""

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None
    seconds: float
    """HELM's ``request_time``: of the engine's, an equal part of the time of all."""


def read_answers(suite: Path) -> list[tuple[Asked, Answer]]:
    """Read the only run of a suite, in HELM's order."""
    (path,) = suite.glob("*/scenario_state.json")
    states = json.loads(path.read_text(encoding="utf-8"))["request_states"]
    return [(_asked(state["request"]), _answer(state["result"])) for state in states]


def _asked(request: dict[str, Any]) -> Asked:
    return Asked(request["prompt"], request["max_tokens"], tuple(request["stop_sequences"]), request["echo_prompt"])


def _answer(result: dict[str, Any]) -> Answer:
    (completion,) = result["completions"]
    tokens = completion["tokens"]
    return Answer(
        text=completion["text"],
        tokens=tuple(token["text"] for token in tokens),
        logprobs=tuple(token["logprob"] for token in tokens),
        finish_reason=(completion.get("finish_reason") or {}).get("reason"),
        seconds=result["request_time"],
    )


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
