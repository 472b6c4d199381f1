"""Gates of scores, answers, fidelity and speed: each takes the evidence and its rule, and returns what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from scipy import special

from flexgen_helm.gate.config import Rule
from flexgen_helm.gate.evidence import Evidence
from flexgen_helm.gate.exact import lossless, tolerance
from flexgen_helm.gate.finding import Finding
from flexgen_helm.gate.intervals import above, below, of_share
from flexgen_helm.reports.engine_figures import engine_cells
from flexgen_helm.reports.join import SIDES
from flexgen_helm.statistics.bootstrap import LEVELS
from flexgen_helm.statistics.clustered import mean_with_error
from flexgen_helm.statistics.flips import Flips, sign_test
from flexgen_helm.statistics.margins import Verdict as Word
from flexgen_helm.statistics.margins import non_inferior
from flexgen_helm.statistics.paired import Paired, paired_difference
from flexgen_helm.statistics.paired import recovery as recovered
from flexgen_helm.statistics.power import POWER, detectable_by, minimum_detectable_effect

Gate = Callable[[Evidence, Rule], Finding]
MLPERF = (99.0, 99.9)
"""Percent of the 16-bit score that MLPerf's two targets ask for."""
UNKNOWN_CHANGE = "what the candidate changes is not recorded, so there is no default; name a threshold in gate.yaml"


def _scores(evidence: Evidence) -> tuple[np.ndarray, np.ndarray, pd.Series] | None:
    """Return scores of both sides, greater is better, and clusters; None: there are none."""
    rows = evidence.part.rows
    known = rows["score_before"].notna() & rows["score_after"].notna()
    if not known.any():
        return None
    sign = -1.0 if evidence.part.lower_is_better else 1.0
    before, after = (sign * rows.loc[known, f"score{side}"].to_numpy(float) for side in SIDES)
    return before, after, evidence.part.clusters[known]


def flips(evidence: Evidence, rule: Rule) -> Finding:
    """Judge by the exact one-sided McNemar test, pooled over all runs; the threshold is its level.

    Without significance it passes only if a loss of the margin's default size would have been seen.
    """
    level = rule.limit(None) or 0.0
    found = _scores(evidence)
    if found is None:
        return Finding.undecided(_no_score(evidence), threshold=level)
    before, after, clusters = found
    counted = sign_test(before, after)
    effect = _effect_of_flips(counted, level) if clusters.is_unique else None
    if effect is None and counted.disagreement_rate:
        effect = detectable_by(paired_difference(before, after, clusters).standard_error, alpha=2 * level)
    told = f"{counted.lost:,} answers lost and {counted.gained:,} gained of {counted.num:,}"
    if counted.p_worse <= level:
        return Finding("fails", counted.p_worse, f"{told}, more losses than chance explains", level, effect)
    if effect is None or effect > DETECTABLE:
        unseen = "any loss" if effect is None else f"a loss of less than {100 * effect:.2g} points"
        return Finding("inconclusive", counted.p_worse, f"{told}; {unseen} can go unseen with so few", level, effect)
    return Finding("passes", counted.p_worse, f"{told}, no more losses than chance explains", level, effect)


DETECTABLE = 0.01
"""`flips` passes only if a true loss of this share would have been found with a probability of 80 %."""


def _effect_of_flips(counted: Flips, level: float) -> float | None:
    if counted.disagreement_rate:
        return minimum_detectable_effect(counted.disagreement_rate, counted.num, alpha=2 * level)
    # Without a gain the test needs this many losses; the effect is the rate at which so many come with 80 %.
    needed = int(np.ceil(-np.log2(level)))
    return float(special.bdtri(needed - 1, counted.num, 1 - POWER)) if needed <= counted.num else None


def margin(evidence: Evidence, rule: Rule) -> Finding:
    """Judge whether the mean score fell by less than the threshold, by the 95 % cluster bootstrap of the paired difference."""
    limit = rule.limit(None) or 0.0
    found = _scores(evidence)
    if found is None:
        return Finding.undecided(_no_score(evidence), threshold=limit)
    paired = paired_difference(*found)
    word = non_inferior(paired, limit)
    return Finding(word, paired.difference, _interval(paired, 100, "points", word), limit, _effect(paired))


def _effect(paired: Paired) -> float | None:
    """Return the smallest change that would have been seen; where no answer got worse, that of which one would have."""
    found = detectable_by(paired.standard_error)
    unseen = 1 - (LEVELS[0] / 100) ** (1 / paired.num)  # of shares of right answers; see flexgen_helm.statistics.margins
    return unseen if found is None and not paired.num_worse else found


def _interval(paired: Paired, factor: float, unit: str, word: str) -> str:
    if paired.interval is None:
        return "one cluster does not show how clusters differ"
    low, high = (factor * end for end in paired.interval)
    few = "; no answer got worse, but there are too few to rule the loss out" if not paired.num_worse else ""
    told = f"95 % interval {low:+.2f} to {high:+.2f} {unit} on {paired.num:,} answers"
    return told + (few if word == "inconclusive" else "")


def recovery(evidence: Evidence, rule: Rule) -> Finding:
    """Judge how much of the baseline's score is left, in percent; MLPerf's two targets are named."""
    limit = rule.limit(None) or 0.0
    found = _scores(evidence)
    if found is None:
        return Finding.undecided(_no_score(evidence), threshold=limit)
    before, after, clusters = found
    ratio = recovered(-after, -before, clusters) if evidence.part.lower_is_better else recovered(before, after, clusters)
    if ratio is None:
        return Finding.undecided("the baseline's score is 0", threshold=limit)
    targets = ", ".join(f"{'meets' if ratio.value >= target else 'misses'} MLPerf's {target:g} %" for target in MLPERF)
    if ratio.interval is None:
        return Finding.undecided(f"{targets}; the ratio has no interval", ratio.value, threshold=limit)
    word = above(ratio.interval, limit)
    paired, mean = paired_difference(before, after, clusters), abs(float(before.mean()))
    loss = mean * (1 - limit / 100)
    if word == "passes" and loss > 0 and not paired.num_worse and non_inferior(paired, loss) == "inconclusive":
        word = "inconclusive"
    effect = _effect(paired)
    low, high = ratio.interval
    told = f"95 % interval {low:.2f} to {high:.2f} %, {targets}"
    return Finding(word, ratio.value, told, limit, None if effect is None else 100 * effect / mean)


def logprob(evidence: Evidence, rule: Rule) -> Finding:
    """Judge the mean change of the right answer's log-probability per token: it moves long before answers flip."""
    limit = rule.limit(evidence.change)
    rows = evidence.part.rows
    rows = rows[rows["logprob_before"].notna() & rows["logprob_after"].notna() & (rows["length"] > 0)]
    if rows.empty:
        return Finding.undecided(evidence.part.reason("logprob"), threshold=limit)
    before, after = (rows[f"logprob{side}"] / rows["length"] for side in SIDES)
    paired = paired_difference(before, after, evidence.part.clusters[rows.index])
    effect = detectable_by(paired.standard_error)
    if limit is None:
        return Finding.undecided(UNKNOWN_CHANGE, paired.difference)
    told = _interval(paired, 1000, "millinats a token", "")
    word = "inconclusive" if paired.interval is None else above(paired.interval, -limit)
    return Finding(word, paired.difference, told, limit, effect)


def logprob_spread(evidence: Evidence, rule: Rule) -> Finding:
    """Judge by how much log-probabilities moved either way, per token: noise that leaves the mean where it was.

    All requests count whose text is the same on both sides; instances are clusters.
    """
    limit = rule.limit(evidence.change)
    found = evidence.requests
    found = found[(found["text_before"] == found["text_after"]) & (found["length_before"] > 0)]
    change = ((found["logprob_after"] - found["logprob_before"]).abs() / found["length_before"]).dropna()
    if change.empty:
        return Finding.undecided("no request has log-probabilities on both sides", threshold=limit)
    mean = mean_with_error(change, (found["scenario"] + " " + found["instance"])[change.index])
    if limit is None:
        return Finding.undecided(UNKNOWN_CHANGE, mean.value)
    word, told = of_share(mean.value, mean.standard_error, limit)
    return Finding(word, mean.value, f"{told} a token, on {len(change):,} requests", limit, detectable_by(mean.standard_error))


def kl(evidence: Evidence, rule: Rule) -> Finding:
    """Judge the mean KL divergence from the baseline's predictions, of a result of ``flexgen-helm fidelity``."""
    return _fidelity(evidence, rule, ("kl", "mean"), below)


def top1(evidence: Evidence, rule: Rule) -> Finding:
    """Judge at how many tokens both find the same one most likely, of a result of ``flexgen-helm fidelity``."""
    return _fidelity(evidence, rule, ("top1_agreement",), above)


def _fidelity(
    evidence: Evidence, rule: Rule, path: tuple[str, ...], judge: Callable[[tuple[float, float], float], Word]
) -> Finding:
    limit, result = rule.limit(evidence.change), evidence.fidelity
    if result is None:
        return Finding.undecided("there is no result of `flexgen-helm fidelity` for these two", threshold=limit)
    value, interval = result.figure(*path)
    if limit is None:
        return Finding.undecided(UNKNOWN_CHANGE, value)
    if interval is None:
        return Finding.undecided("the text is one window, which shows no spread", value, threshold=limit)
    error = (interval[1] - interval[0]) / (2 * special.ndtri(0.975))
    told = f"95 % interval {interval[0]:.3g} to {interval[1]:.3g} on {result.positions:,} predictions"
    return Finding(judge(interval, limit), value, told, limit, detectable_by(error))


def length(evidence: Evidence, rule: Rule) -> Finding:
    """Judge how long generated texts are beside the baseline's: broken models stop early, or never."""
    limit = rule.limit(None) or 0.0
    rows = evidence.part.rows
    rows = rows[rows["tokens_before"].notna() & rows["tokens_after"].notna()]
    if rows.empty:
        return Finding.undecided(evidence.part.reason("tokens"), threshold=limit)
    before, after = (rows[f"tokens{side}"].to_numpy(float) for side in SIDES)
    clusters = evidence.part.clusters[rows.index]
    ratio = recovered(before, after, clusters)
    if ratio is None or ratio.interval is None:
        return Finding.undecided("the baseline generated too little to compare with", threshold=limit)
    low, high = (end / 100 for end in ratio.interval)
    effect = detectable_by(paired_difference(before, after, clusters).standard_error)
    told = f"95 % interval {low:.1%} to {high:.1%} of the baseline's tokens on {len(rows):,} answers"
    return Finding(above((low, high), limit), ratio.value / 100, told, limit, effect and effect / float(before.mean()))


def unparsable(evidence: Evidence, rule: Rule) -> Finding:
    """Judge whether the share of answers that are none of the letters offered, or empty, rose by less than the threshold."""
    limit = rule.limit(None) or 0.0
    rows = evidence.part.rows
    rows = rows[rows["parsable_before"].notna() & rows["parsable_after"].notna()]
    if rows.empty:
        return Finding.undecided(evidence.part.reason("parsable"), threshold=limit)
    paired = paired_difference(rows["parsable_before"], rows["parsable_after"], evidence.part.clusters[rows.index])
    word = non_inferior(paired, limit)
    before, after = (1 - float(rows[f"parsable{side}"].mean()) for side in SIDES)
    told = f"{before:.1%} before and {after:.1%} after"
    few = "; too few answers to rule the rise out" if word == "inconclusive" else ""
    return Finding(word, after - before, told + few, limit, _effect(paired))


def throughput(evidence: Evidence, rule: Rule) -> Finding:
    """Judge tokens per second beside the baseline's, on the same machine; single measurements have no error."""
    limit = rule.limit(None) or 0.0
    pairs = [(one, other) for one, other in evidence.engines if one is not None and other is not None]
    if len(pairs) < len(evidence.engines) or not all(one.environment for one, _ in pairs):
        return Finding.undecided("the record of one side does not name the machine", threshold=limit)
    if any(one.environment != other.environment for one, other in pairs):
        return Finding.undecided("machine, threads or versions differ", threshold=limit)
    cells = [
        next(cell for cell in engine_cells(side) if cell.figure == "tokens_per_second") for side in zip(*pairs, strict=True)
    ]
    if reason := next((cell.note for cell in cells if np.isnan(cell.value)), ""):
        return Finding.undecided(reason, threshold=limit)
    ratio = cells[1].value / cells[0].value
    told = f"{cells[1].value:,.0f} tokens/s after {cells[0].value:,.0f}"
    return Finding("passes" if ratio >= limit else "fails", ratio, told, limit)


def _no_score(evidence: Evidence) -> str:
    return evidence.part.reason("score") if evidence.part.facts else "there are no scores"


GATES: Mapping[str, Gate] = {
    gate.__name__: gate
    for gate in (
        *(lossless, tolerance, flips, margin, recovery, logprob, logprob_spread),
        *(kl, top1, length, unparsable, throughput),
    )
}
"""By the names of `flexgen_helm.gate.config.SPECS`."""
ALONE = ("margin", "logprob")
"""Gates that also judge each run whose scores are no shares of right answers."""
