"""The rows of one run: what the model answered to each instance, and how that was judged."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flexgen_helm.reports.contents import Completion, InstanceStats, Request, Stat, Token
from flexgen_helm.reports.main_metrics import MainMetric
from flexgen_helm.reports.runs import Run

OF_WINDOWS = {"bits_per_byte": -1 / math.log(2), "logprob_per_byte": 1.0}
"""Metrics of whole documents that are sums over windows divided by bytes: factor of the log-probability."""
MOST_SPACE = 16
"""Characters that may stand around a choice before the search for its tokens ends."""
UNTOLD = ("model", "model_deployment")
"""Fields of a request that may differ between runs that are compared."""


class Key(NamedTuple):
    """Which row of a run it is."""

    instance: str
    perturbation: str
    """HELM's description as JSON; empty for inputs as they are."""
    trial: int
    part: int
    """Number of the window, where a document is cut into windows; else 0."""


@dataclass(frozen=True)
class Row:
    """One instance with one perturbation and one choice of examples."""

    key: Key
    split: str
    score: float
    """Of the main metric; NaN: HELM has none for single instances."""
    logprob: float
    """Log-probability of the correct answer in nats; NaN: not known."""
    answer: str
    """What the model wrote, or the choice that it holds most likely; empty where a text is scored."""
    answer_logprob: float
    """Log-probability of that answer in nats; NaN: not known."""
    tokens: float
    """Generated tokens; NaN where nothing is generated."""
    parsable: float
    """1 if the answer is one of the letters offered, or any text where none are; NaN where nothing is generated."""
    correct: str
    """The correct answers of the data set."""
    prompt: str
    """Digest of everything that was asked, in order."""


@dataclass(frozen=True)
class Asked:
    """One request of a row."""

    key: Key
    mode: str
    reference: int
    """Index of the choice that it scores; -1: none."""
    logprob: float
    """Log-probability of that choice, or of the generated text, in nats; NaN: not known."""
    text: str
    """Generated text; empty where nothing is generated."""
    prompt: str
    """Digest of what was asked."""


def read_rows(run: Run, main: MainMetric) -> tuple[list[Row], list[Asked]]:
    """Return rows and requests of a run in HELM's order.

    Args:
        run: A complete run.
        main: Its main metric.

    Raises:
        CorruptFile: A file cannot be read.
    """
    judge = _Judge(run, main)
    rows, asked = [], []
    for key, requests in keyed_requests(run).items():
        ours = [_asked(key, request) for request in requests]
        rows.append(_row(key, requests, ours, judge))
        asked.extend(ours)
    return rows, asked


def keyed_requests(run: Run) -> dict[Key, list[Request]]:
    """Return the requests of each row of a run, in HELM's order.

    Raises:
        CorruptFile: The file of the requests cannot be read.
    """
    grouped: dict[Key, list[Request]] = defaultdict(list)
    number = _Numbering(run)
    for request in run.requests():
        grouped[number(request.instance_id, request.perturbation, request.train_trial)].append(request)
    return grouped


class _Numbering:
    """Makes keys; the windows of a document are numbered in the order in which they come."""

    def __init__(self, run: Run) -> None:
        self._windows = method_of(run) == "language_modeling"
        self._parts: dict[Key, int] = defaultdict(int)

    def __call__(self, instance: str | None, perturbation: str | None, trial: int) -> Key:
        key = Key(instance or "", perturbation or "", trial, 0)
        if not self._windows:
            return key
        self._parts[key] += 1
        return key._replace(part=self._parts[key] - 1)


def method_of(run: Run) -> str:
    """Return HELM's adapter method, such as ``multiple_choice_joint``; empty if the spec does not say."""
    return str(run.spec["adapter_spec"].get("method", ""))


def digest_of(request: Request) -> str:
    """Return a digest of everything that was asked except of whom."""
    told = {name: value for name, value in request.asked.items() if name not in UNTOLD}
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()


class _Judge:
    """Finds the statistics of each row."""

    def __init__(self, run: Run, main: MainMetric) -> None:
        self._main, self.windows = main, method_of(run) == "language_modeling"
        self._stats: dict[Key, dict[str, tuple[float, int]]] = {}
        number = _Numbering(run)
        for entry in run.instance_stats():
            # Of a document, other metrics have an entry for the whole.
            if not self.windows or _is_window(entry):
                _add(self._stats.setdefault(number(entry.instance_id, entry.perturbation, entry.train_trial), {}), entry.stats)
        sums = [stats["num_bytes"][0] for stats in self._stats.values()] if self.windows else []
        self._mean_bytes = sum(sums) / len(sums) if sums else 0.0

    def score(self, key: Key) -> float:
        """Return the main metric of a row."""
        if self.windows:
            factor = OF_WINDOWS.get(self._main.name or "")
            # Divided by the mean number of bytes, so that the mean over windows is HELM's quotient of sums.
            return math.nan if factor is None or not self._mean_bytes else factor * self.logprob(key) / self._mean_bytes
        return self._mean(key, self._main.name)

    def logprob(self, key: Key) -> float:
        """Return the log-probability of a window."""
        return _finite(self._stats[key]["logprob"][0]) if key in self._stats else math.nan

    def predicted(self, key: Key) -> int | None:
        """Return the index of the choice that the model holds most likely."""
        index = self._mean(key, "predicted_index")
        return None if math.isnan(index) else round(index)

    def _mean(self, key: Key, name: str | None) -> float:
        total, count = self._stats.get(key, {}).get(name or "", (math.nan, 0))
        return _finite(total / count) if count else math.nan


def _is_window(entry: InstanceStats) -> bool:
    return {"logprob", "num_bytes"} <= {stat.name for stat in entry.stats}


def _add(sums: dict[str, tuple[float, int]], stats: Sequence[Stat]) -> None:
    for stat in stats:
        if stat.count:
            total, count = sums.get(stat.name, (0.0, 0))
            sums[stat.name] = total + stat.sum, count + stat.count


def _row(key: Key, requests: Sequence[Request], asked: Sequence[Asked], judge: _Judge) -> Row:
    first = requests[0]
    scored = {one.reference: one.logprob for one in asked if one.reference >= 0 and one.mode != "calibration"}
    generated = not scored and not judge.windows
    logprob, answer, answer_logprob = math.nan, "", math.nan
    if scored:
        right = [scored[number] for number, one in enumerate(first.references) if one.correct and number in scored]
        logprob = _highest(right)
        chosen = judge.predicted(key)
        if chosen is not None and chosen < len(first.references):
            answer, answer_logprob = first.references[chosen].text, scored.get(chosen, math.nan)
    elif generated:
        answer, answer_logprob = asked[0].text, asked[0].logprob
    else:
        logprob = judge.logprob(key)
    return Row(
        key=key,
        split=first.split or "",
        score=judge.score(key),
        logprob=logprob,
        answer=answer,
        answer_logprob=answer_logprob,
        tokens=_mean_tokens(requests) if generated else math.nan,
        parsable=_parsable(first) if generated else math.nan,
        correct=" | ".join(one.text for one in first.references if one.correct),
        prompt=asked[0].prompt if len(asked) == 1 else _digest_of_all(asked),
    )


def _highest(values: Sequence[float]) -> float:
    """Several correct answers: the likeliest of them, if all are known."""
    return math.nan if not values or any(map(math.isnan, values)) else max(values)


def _digest_of_all(asked: Sequence[Asked]) -> str:
    return hashlib.blake2b("".join(one.prompt for one in asked).encode(), digest_size=8).hexdigest()


def _asked(key: Key, request: Request) -> Asked:
    completion = request.completions[0] if request.completions else None
    echoed = bool(request.asked.get("echo_prompt")) or request.asked.get("max_tokens") == 0
    logprob = math.nan
    if completion is not None:
        logprob = _scored(completion, request) if request.reference_index is not None else _logprob(completion.tokens)
    return Asked(
        key=key,
        mode=request.mode or "",
        reference=-1 if request.reference_index is None else request.reference_index,
        logprob=logprob,
        text="" if completion is None or echoed else completion.text,
        prompt=digest_of(request),
    )


def _logprob(tokens: Sequence[Token]) -> float:
    values = [math.nan if token.logprob is None else token.logprob for token in tokens]
    # A client that has no log-probabilities reports zeros, which HELM too takes for none.
    return _finite(sum(values)) if any(values) else math.nan


def _finite(value: float) -> float:
    """Return NaN, which stands for a missing number, in the place of infinity: no mean could hold it."""
    return value if math.isfinite(value) else math.nan


def _scored(completion: Completion, request: Request) -> float:
    """Return the log-probability of the last tokens that hold the choice; NaN where they cannot be told from the prompt."""
    choice = request.references[request.reference_index or 0].text.strip()
    text = ""
    for count, token in enumerate(reversed(completion.tokens), 1):
        text = token.text + text
        if choice in text:
            return _logprob(completion.tokens[-count:])
        if len(text) > 2 * len(choice) + MOST_SPACE:
            break
    return math.nan


def _mean_tokens(requests: Sequence[Request]) -> float:
    counts = [len(completion.tokens) for request in requests for completion in request.completions]
    return sum(counts) / len(counts) if counts else math.nan


def _parsable(request: Request) -> float:
    if not request.completions:
        return math.nan
    text, letters = request.completions[0].text.strip(), request.output_mapping
    return float(text in letters if letters else bool(text))


def _shorter(one: str, other: str) -> int:
    return min(len(one), len(other))


def first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return the first field in which two requests of HELM differ, and where, in words; empty if they ask the same."""
    for name in sorted((before.keys() | after.keys()) - set(UNTOLD), key=lambda name: (name != "prompt", name)):
        one, other = before.get(name), after.get(name)
        if one == other:
            continue
        if isinstance(one, str) and isinstance(other, str):
            at = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), _shorter(one, other))
            begin = max(at - 20, 0)
            return f"`{name}` differs from character {at} on: {one[begin : at + 30]!r} and {other[begin : at + 30]!r}"
        return f"`{name}` is {one!r} and {other!r}"
    return ""
