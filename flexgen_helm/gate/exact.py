"""Gates of a change that claims to change no answer: not by a bit, or within what rounding may do."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from flexgen_helm.gate.config import Rule
from flexgen_helm.gate.evidence import Evidence, differing
from flexgen_helm.gate.finding import Finding
from flexgen_helm.reports.engine_record import NO_RECORD, EngineRecord

OF_PROMPTS = 3.0
"""A log-probability of the prompt may differ by this many times as much as one of a generated token: 3e-4 and 1e-4 nats."""
ENVIRONMENT = ("processor", "instructions", "device", "threads", "variables", "torch", "transformers")
"""What must be equal besides the numerics, so that equal bits can be expected."""


def lossless(evidence: Evidence, rule: Rule) -> Finding:
    """Judge whether every request returned the same bits: texts, tokens and log-probabilities.

    Answers of one engine on one machine are bit-stable, so a single bit that differs is a change and no noise. It decides only
    where numerics, processor, threads and versions are equal on both sides and known.
    """
    if reason := next(_unequal(evidence), ""):
        return Finding.undecided(f"bits can be compared only between equal engines on equal machines: {reason}")
    requests = evidence.requests
    changed = requests[requests["returned_before"] != requests["returned_after"]]
    if len(changed):
        texts = int((changed["text_before"] != changed["text_after"]).sum())
        first = changed.iloc[0]
        return Finding(
            "fails",
            float(len(changed)),
            f"{len(changed):,} of {len(requests):,} requests returned other bits ({texts:,} other texts, log-probabilities off "
            f"by up to {_largest(changed)}); the first is instance {first['instance']} of {first['scenario']}",
        )
    if missing := sum(evidence.missing.values()):
        return Finding.undecided(
            f"all {len(requests):,} common requests have equal bits, but {missing:,} rows are on one side only"
        )
    if not len(requests):
        return Finding.undecided("there is no request")
    cached = _cached(evidence)
    if cached == len(requests):
        return Finding.undecided("every answer of the candidate came from HELM's cache, so nothing was computed again")
    note = f", of which {cached:,} came from HELM's cache" if cached else ""
    return Finding("passes", 0.0, f"all {len(requests):,} requests{note} returned the same bits")


def _unequal(evidence: Evidence) -> Iterator[str]:
    """Yield why bits cannot be expected to be equal."""
    for before, after in evidence.engines:
        if before is None or after is None:
            yield NO_RECORD
            continue
        for side, engine in (("baseline", before), ("candidate", after)):
            if not set(ENVIRONMENT) <= engine.environment.keys() or not engine.numerics:
                yield f"the record of the {side} does not name machine and versions; evaluate it again"
        yield from (f"the numerics differ in {text}" for text in _parts(before, after))
        pair = [{name: engine.environment.get(name) for name in ENVIRONMENT} for engine in (before, after)]
        yield from (f"the machines differ in {text}" for text in differing(*pair))


def _parts(before: EngineRecord, after: EngineRecord) -> Iterator[str]:
    """Yield what differs within the parts of the numerics, such as ``rows.gpu_batch_size``."""
    for name in sorted(before.numerics.keys() | after.numerics.keys()):
        one, other = before.numerics.get(name), after.numerics.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from (f"{name}.{text}" for text in differing(one, other))
        elif one != other:
            yield from differing({name: one}, {name: other})


def _cached(evidence: Evidence) -> int:
    return sum(after.sources.get("cached", 0) for _, after in evidence.engines if after is not None)


def _largest(requests: pd.DataFrame) -> str:
    change = (requests["logprob_after"] - requests["logprob_before"]).abs().dropna()
    return "an unknown amount" if change.empty else f"{change.max():.2g} nats"


def tolerance(evidence: Evidence, rule: Rule) -> Finding:
    """Judge whether texts are equal and log-probabilities differ by no more than rounding does (level C of exactness).

    The threshold is for a generated token; log-probabilities of prompts and choices may differ by `OF_PROMPTS` times as much.
    """
    requests, limit = evidence.requests, rule.limit(None) or 0.0
    if requests.empty:
        return Finding.undecided("there is no request")
    texts = int((requests["text_before"] != requests["text_after"]).sum())
    known = requests[requests["logprob_before"].notna() & requests["logprob_after"].notna() & (requests["length_before"] > 0)]
    if texts:
        return Finding("fails", None, f"{texts:,} of {len(requests):,} generated texts differ", threshold=limit)
    if known.empty:
        return Finding.undecided("no request has log-probabilities on both sides", threshold=limit)
    factor = np.where(known["text_before"] == "", OF_PROMPTS, 1.0)
    change = (known["logprob_after"] - known["logprob_before"]).abs() / known["length_before"] / factor
    largest = float(change.max())
    above = int((change > limit).sum())
    told = f"log-probabilities of {len(known):,} of {len(requests):,} requests are known"
    if above:
        return Finding("fails", largest, f"{above:,} requests are off by more, texts are equal, {told}", threshold=limit)
    if missing := sum(evidence.missing.values()):
        return Finding.undecided(f"{missing:,} rows are on one side only", largest, threshold=limit)
    return Finding("passes", largest, f"every text is equal, {told}", threshold=limit)
