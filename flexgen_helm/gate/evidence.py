"""Baseline and candidate side by side, as gates look at them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from flexgen_helm.gate.config import Change
from flexgen_helm.reports.answers import KEY_COLUMNS, Answers
from flexgen_helm.reports.engine_record import EngineRecord
from flexgen_helm.reports.fidelity_results import FidelityResult
from flexgen_helm.reports.figures import Part, parts
from flexgen_helm.reports.join import SIDES, Joined, join

REQUEST_KEY = (*KEY_COLUMNS, "mode", "reference")
ALL = "all runs"


def digest_of_text(text: str) -> str:
    """Return a digest by which texts are compared; empty for no text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest() if text else ""


def digested(answers: Answers) -> Answers:
    """Return answers with digests in the place of what a model wrote, as a baseline file holds them."""
    rows = answers.rows.assign(answer=answers.rows["answer"].map(digest_of_text), correct="")
    requests = answers.requests.assign(text=answers.requests["text"].map(digest_of_text))
    return replace(answers, rows=rows, requests=requests)


@dataclass(frozen=True)
class Evidence:
    """What a gate may look at."""

    part: Part
    """Joined rows that are judged together."""
    requests: pd.DataFrame
    """Joined requests of all runs: `REQUEST_KEY`, then ``logprob``, ``text``, ``length``, ``returned`` of both `SIDES`."""
    missing: Mapping[str, int]
    """Rows that ``baseline`` and ``candidate`` lack."""
    engines: Sequence[tuple[EngineRecord | None, EngineRecord | None]]
    """Of the baseline and the candidate, for each run that both have."""
    fidelity: FidelityResult | None

    @property
    def subject(self) -> str:
        """What is judged, in words."""
        return ALL if self.part.level == "suite" else self.part.scenario

    @property
    def change(self) -> Change | None:
        """What the candidate changes; None where an engine is not known."""
        found = {_change(before, after) for before, after in self.engines}
        return found.pop() if len(found) == 1 else None


def _change(before: EngineRecord | None, after: EngineRecord | None) -> Change | None:
    if before is None or after is None or not before.numerics or not after.numerics:
        return None
    if [_form(each) for each in (before,)] == [_form(after)]:
        return "same"
    if after.variant is None:
        return "16-bit"
    bits = after.bits_per_compressed_weight
    return "8-bit" if bits is not None and bits >= 7 else "low-bit"


def _form(engine: EngineRecord) -> tuple[Any, ...]:
    """Return what decides how numbers are stored. The checkpoint, row sizes and kernels are no part of it."""
    weights = {name: value for name, value in engine.numerics.get("weights", {}).items() if name != "digest"}
    return weights, engine.numerics.get("cache")


def gather(
    before: Answers, after: Answers, fidelity: FidelityResult | None, *, common_runs: bool = False
) -> tuple[Evidence, list[Evidence]]:
    """Join two configurations.

    Args:
        before: The baseline, `digested`.
        after: The candidate, `digested`.
        fidelity: Result for the two; None: there is none.
        common_runs: Whether run entries that one side lacks are left out.

    Returns:
        What is judged together, and the runs whose scores are no shares of right answers, which are judged alone.

    Raises:
        NotComparable: See `flexgen_helm.reports.join.join`.
    """
    joined = join(before, after, common_runs=common_runs)
    found = list(parts(after, joined.rows))
    suite = next((part for part in found if part.level == "suite"), None)
    alone = set(suite.left_out) if suite is not None else {part.scenario for part in found if part.level == "run"}
    common = [name for name in after.runs if name not in joined.left_out and name in before.runs]
    if suite is None:
        plain = joined.rows[joined.rows["counts"] & (joined.rows["perturbation"] == "")]
        suite = Part("suite", ALL, "", plain, [after.runs[name] for name in common])
    whole = Evidence(
        part=suite,
        requests=_join_requests(before, after, joined),
        missing={side: int(joined.missing[side].sum()) for side in ("baseline", "candidate")},
        engines=[(before.runs[name].engine, after.runs[name].engine) for name in common],
        fidelity=fidelity,
    )
    runs = [part for part in found if part.level == "run" and not part.perturbation and part.scenario in alone]
    return whole, [replace(whole, part=part) for part in runs]


def _join_requests(before: Answers, after: Answers, joined: Joined) -> pd.DataFrame:
    frames = [_numbered(side.requests) for side in (before, after)]
    keys = [*REQUEST_KEY, "again"]
    merged = frames[0].merge(frames[1], on=keys, suffixes=SIDES, validate="one_to_one")
    return merged.merge(joined.rows[list(KEY_COLUMNS)], on=list(KEY_COLUMNS))


def _numbered(requests: pd.DataFrame) -> pd.DataFrame:
    """Number requests of one key, so that each has its partner."""
    return requests.assign(again=requests.groupby(list(REQUEST_KEY), sort=False).cumcount())


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield in words what differs between two mappings."""
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield f"{name} ({_short(before.get(name))} and {_short(after.get(name))})"


def _short(value: Any) -> str:
    text = "not recorded" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
