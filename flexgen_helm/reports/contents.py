"""The content of the files that HELM and this package write for runs, as dataclasses made of parsed JSON.

A parser raises KeyError, TypeError, ValueError or AttributeError where the content is something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a completion."""

    text: str
    logprob: float | None


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer to a request; the prompt's own tokens where the request asks for their log-probabilities."""

    text: str
    logprob: float | None
    """Sum over the tokens, as the client has reported it."""
    tokens: tuple[Token, ...]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Reference:
    """A possible answer to an instance, as the data set has it."""

    text: str
    correct: bool


@dataclass(frozen=True, slots=True)
class Request:
    """A request with its answers and the instance that it belongs to."""

    instance_id: str | None
    split: str | None
    perturbation: str | None
    """HELM's description of the perturbation as JSON with sorted keys; None for inputs as they are."""
    train_trial: int
    mode: str | None
    """``original`` or ``calibration`` for calibrated multiple choice, otherwise None."""
    reference_index: int | None
    """Index in ``references`` of the choice that the request scores, if it scores one."""
    references: tuple[Reference, ...]
    output_mapping: Mapping[str, str]
    """Text of a choice by its letter in the prompt; empty where the prompt has no letters."""
    prompt: str
    asked: Mapping[str, Any]
    """All fields of HELM's request, such as ``prompt``, ``messages``, ``max_tokens`` and ``echo_prompt``."""
    completions: tuple[Completion, ...]
    """Empty if the request failed or was not sent, as in a dry run."""
    seconds: float | None
    """HELM's ``request_time``. For our deployments it is an equal share of the time of all requests."""
    cached: bool
    """Whether the answer came from a cache or an earlier command."""


@dataclass(frozen=True, slots=True)
class Stat:
    """A metric, aggregated over a run or over the requests of an instance."""

    name: str
    split: str | None
    sub_split: str | None
    perturbation: str | None
    """As in `Request`, with HELM's ``computed_on``; None for inputs as they are."""
    count: int
    sum: float
    mean: float | None
    """None if nothing was counted."""


@dataclass(frozen=True, slots=True)
class InstanceStats:
    """All metrics of an instance with one perturbation and one choice of examples."""

    instance_id: str | None
    perturbation: str | None
    train_trial: int
    stats: tuple[Stat, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """What this package recorded of serving the requests of a deployment in one go."""

    deployment: str
    date: datetime
    """When serving ended."""
    runs: tuple[str, ...]
    """Names of the runs that were served."""
    num_requests: int
    num_cached: int
    num_resumed: int
    measured: Mapping[str, Any] | None
    """Speed and statistics of the requests that were computed then; None if every answer was known before."""


def parse_spec(content: Any) -> dict[str, Any]:
    """Check the fields of a run spec that readers rely on, and return all of them."""
    _typed(content["adapter_spec"]["model_deployment"], str)
    _typed(content["groups"], list)
    _typed(content["scenario_spec"], dict)
    return _typed(content, dict)


def parse_record(content: Any) -> dict[str, Any]:
    """Check that this package recorded the run, and return its record."""
    _typed(content["deployment"], str)
    return _typed(content, dict)


def _perturbation(owner: dict[str, Any]) -> str | None:
    return json.dumps(owner["perturbation"], sort_keys=True) if owner.get("perturbation") is not None else None


def parse_list(content: Any, parse: Callable[[Any], T]) -> list[T]:
    """Parse each entry of a list."""
    return [parse(entry) for entry in _typed(content, list)]


def parse_request(state: dict[str, Any]) -> Request:
    """Make a request of a state of ``scenario_state.json``."""
    # HELM leaves out fields that are None.
    instance, asked, result = state["instance"], state["request"], state.get("result", {})
    return Request(
        instance_id=instance.get("id"),
        split=instance.get("split"),
        perturbation=_perturbation(instance),
        train_trial=state["train_trial_index"],
        mode=state.get("request_mode"),
        reference_index=state.get("reference_index"),
        references=tuple(Reference(one["output"]["text"], "correct" in one["tags"]) for one in instance["references"]),
        output_mapping=state.get("output_mapping", {}),
        prompt=_typed(asked["prompt"], str),
        asked=asked,
        completions=tuple(_completion(one) for one in result.get("completions", ())),
        seconds=result.get("request_time"),
        cached=result.get("cached", False),
    )


def _completion(content: dict[str, Any]) -> Completion:
    tokens = tuple(Token(token["text"], token.get("logprob")) for token in content["tokens"])
    reason = (content.get("finish_reason") or {}).get("reason")
    return Completion(_typed(content["text"], str), content.get("logprob"), tokens, reason)


def parse_stat(content: dict[str, Any]) -> Stat:
    """Make a metric of an entry of ``stats.json``."""
    name = content["name"]
    split, sub_split, count = name.get("split"), name.get("sub_split"), _typed(content["count"], int)
    mean = content.get("mean") if count else None
    return Stat(name["name"], split, sub_split, _perturbation(name), count, content.get("sum", 0.0), mean)


def parse_instance_stats(content: dict[str, Any]) -> InstanceStats:
    """Make the metrics of an instance of an entry of ``per_instance_stats.json``."""
    stats = tuple(parse_stat(stat) for stat in content["stats"])
    return InstanceStats(content.get("instance_id"), _perturbation(content), content["train_trial_index"], stats)


def parse_workload(entry: dict[str, Any]) -> Workload:
    """Make a workload of an entry of ``flexgen_workload.json``."""
    measured = entry["measured"]
    return Workload(
        deployment=entry["deployment"],
        date=datetime.fromisoformat(entry["date"]),
        runs=tuple(entry.get("runs", ())),
        num_requests=entry["num_requests"],
        num_cached=entry["num_cached"],
        num_resumed=entry["num_resumed"],
        # An entry of a time at which nothing was computed keeps the measurement of an earlier one, with that one's date.
        measured=measured if measured is not None and measured.get("date") == entry["date"] else None,
    )


def _typed(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value
