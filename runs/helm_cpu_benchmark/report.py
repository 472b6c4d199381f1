"""Measurements of both sides, and the lines that are printed of them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_helm.runs.helm_cpu_benchmark.differences import REASONS, Differences
from flexgen_helm.runs.helm_cpu_benchmark.entries import Entry
from flexgen_helm.runs.helm_overhead.sampled import START, STEPS, WAITING

MODEL = ("layers", WAITING)
SHOWN_S = 0.05
"""Steps that take less are not shown."""


@dataclass(frozen=True)
class Side:
    """Times of one side for an entry, in seconds."""

    model_s: float
    wall_s: float
    steps_s: dict[str, float]
    """Wall clock of each step, see ``sampled.STEPS``; "waiting" is for the engine's thread."""


@dataclass(frozen=True)
class Comparison:
    """One entry."""

    entry: Entry
    threads: int
    requests: int
    tokens_asked: int
    tokens_computed: int
    theirs: Side
    ours: Side
    differences: Differences

    @property
    def time_ratio(self) -> float:
        """How many times less model time the engine needs."""
        return self.theirs.model_s / self.ours.model_s

    @property
    def token_ratio(self) -> float:
        """Prompt tokens asked over those of distinct prefixes."""
        return self.tokens_asked / self.tokens_computed

    @property
    def share(self) -> float:
        """Time ratio over token ratio."""
        return self.time_ratio / self.token_ratio

    def as_dict(self) -> dict[str, object]:
        """Everything measured and derived."""
        derived = {"time_ratio": self.time_ratio, "token_ratio": self.token_ratio, "share": self.share}
        return {**dataclasses.asdict(self), **derived}


def render(one: Comparison) -> list[str]:
    """Return the lines that a person reads of an entry."""
    found = one.differences
    counts = ", ".join(f"{kind} {count}" for kind, count in found.counts.items())
    theirs, ours = one.theirs, one.ours
    verdicts = ", ".join(f"{who} {count}" for who, count in found.verdicts.items()) or "nothing to judge"
    scored = ", ".join(f"{who} {count}" for who, count in found.scored_right.items())
    return [
        f"{one.entry.run_entry}: {one.requests} requests, {one.threads} threads",
        f"  prompt tokens  {one.tokens_asked:,} asked, {one.tokens_computed:,} of distinct prefixes, {one.token_ratio:.2f}:1",
        f"  model time     HELM's client {theirs.model_s:.1f} s, engine {ours.model_s:.1f} s: {one.time_ratio:.2f} times, "
        f"{one.share:.2f} of the token ratio{_aim(one)}",
        f"  wall clock     HELM's client {theirs.wall_s:.1f} s, engine {ours.wall_s:.1f} s: "
        f"{theirs.wall_s / ours.wall_s:.2f} times",
        f"  differing      {counts}",
        f"  who is right   where answers differ: {verdicts}; equal: both in {found.equal_right} of {found.equal_judged}",
        f"  log-probs      of {found.judged} judged right: {scored}",
        *(f"    {example}" for example in found.examples),
    ]


def _aim(one: Comparison) -> str:
    for aim, reached in ((one.entry.share_aimed_at, one.share), (one.entry.ratio_aimed_at, one.time_ratio)):
        if aim is not None:
            return f" (aim {aim:.2f}: {'reached' if reached >= aim else 'missed'})"
    return ""


def total_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the lines that a person reads of all entries together."""
    theirs, ours = ([getattr(one, side) for one in comparisons] for side in ("theirs", "ours"))
    model = [sum(side.model_s for side in sides) for sides in (theirs, ours)]
    wall = [sum(side.wall_s for side in sides) for sides in (theirs, ours)]
    steps = [_steps(sides) for sides in (theirs, ours)]
    lines = [
        "",
        f"all entries: model time {model[0]:.1f} s and {model[1]:.1f} s, {model[0] / model[1]:.2f} times; "
        f"wall clock {wall[0]:.1f} s and {wall[1]:.1f} s, {wall[0] / wall[1]:.2f} times",
        f"  {'where the wall clock goes, s':30}{'HELM' + chr(39) + 's client':>14}{'engine':>10}",
    ]
    steps = [
        {**known, "start and end of Python": whole - sum(known.values())} for whole, known in zip(wall, steps, strict=True)
    ]
    for step in dict.fromkeys([*steps[1], *steps[0]]):
        lines.append(f"  {step:30}{steps[0].get(step, 0):14.1f}{steps[1].get(step, 0):10.1f}")
    counts = {kind: sum(one.differences.counts[kind] for one in comparisons) for kind in REASONS}
    lines += ["", f"of {sum(one.requests for one in comparisons)} answers, so many differ in"]
    return [*lines, *(f"  {kind}: {count}. {REASONS[kind]}" for kind, count in counts.items() if count)]


def _steps(sides: Sequence[Side]) -> dict[str, float]:
    """Add up the steps of all entries; what the main thread waits for is the model, as is the client's computation."""
    totals: dict[str, float] = defaultdict(float)
    for side in sides:
        for step in (START, *STEPS, WAITING):
            totals["model" if step in MODEL else step] += side.steps_s.get(step, 0.0)
    return {step: seconds for step, seconds in totals.items() if seconds >= SHOWN_S}
