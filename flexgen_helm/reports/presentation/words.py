"""What figures are called, what they mean, and how their numbers are written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd

ABSENT = "-"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"


def _percent(value: float) -> str:
    return f"{value:.2f} %"


def _significant(value: float) -> str:
    return f"{value:.3g}"


def _bits(value: float) -> str:
    return f"{value:.2f}"


def _bytes(value: float) -> str:
    power = min(int(math.log2(value) // 10), 4) if value >= 1 else 0
    return f"{value / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


@dataclass(frozen=True)
class Words:
    """How a figure is shown."""

    title: str
    meaning: str
    write: Callable[[float], str] = _three


FIGURES: dict[str, Words] = {
    "instances": Words("instances", "instances that both sides answered", _count),
    "missing_baseline": Words("missing in the baseline", "instances that only the candidate answered", _count),
    "missing_candidate": Words("missing", "instances that only the baseline answered", _count),
    "score": Words("score", "mean of the main metric"),
    "standard_error": Words("standard error", "of the score, clustered", _three),
    "score_before": Words("baseline's score", "on the same instances"),
    "recovery": Words("recovery", "score in per cent of the baseline's, with a 95 % interval", _percent),
    "difference": Words("difference", "mean paired difference of the scores, with a 95 % cluster bootstrap", _signed),
    "lost": Words("lost", "answers that got worse", _count),
    "gained": Words("gained", "answers that got better", _count),
    "flips": Words("flips", "share of answers that changed, either way", _share),
    "p_value": Words("p", "exact McNemar test, two-sided", _significant),
    "p_worse": Words("p worse", "exact McNemar test, one-sided: more lost than gained", _significant),
    "minimum_detectable": Words("detectable", "smallest true difference found in 80 % of such comparisons at 5 %", _three),
    "logprob_change": Words("log-probability", "mean change of the correct answer's log-probability in nats, 95 %", _signed),
    "unparsable_before": Words("unparsable, baseline", "share of the baseline's answers that are none of the choices", _share),
    "unparsable": Words("unparsable", "share of answers that are none of the choices, or empty", _share),
    "tokens_before": Words("tokens, baseline", "mean number of tokens that the baseline generated", _bits),
    "tokens": Words("tokens", "mean number of generated tokens", _bits),
    "length_ratio": Words("length", "generated tokens over the baseline's", _three),
    "bits": Words("bits", "of a compressed weight, or of a weight as it was released", _bits),
    "bits_per_weight": Words("bits per weight", "average over all weights as they are stored, scales included", _bits),
    "bits_per_compressed_weight": Words("bits per compressed weight", "scales included", _bits),
    "bits_per_cache_element": Words("bits per K/V element", "scales included", _bits),
    "bits_per_k_element": Words("bits per K element", "scales included", _bits),
    "bits_per_v_element": Words("bits per V element", "scales and means included", _bits),
    "weight_bytes_device": Words("weights, device", "bytes where matrices are multiplied", _bytes),
    "weight_bytes_host": Words("weights, host", "bytes of weights in memory beside a GPU", _bytes),
    "weight_bytes_disk": Words("weights, disk", "bytes of weights on disk", _bytes),
    "cache_bytes_device": Words("K/V, device", "most bytes of K and V", _bytes),
    "cache_bytes_host": Words("K/V, host", "most bytes of K and V in memory beside a GPU", _bytes),
    "cache_bytes_disk": Words("K/V, disk", "most bytes of K and V on disk", _bytes),
    "tokens_per_second": Words("tokens/s", "prompt tokens computed and tokens generated; cached answers are left out", _count),
    "limit_share": Words("of the limit", "least time of this machine over the time taken", _share),
    "kl_mean": Words("mean KL", "Kullback-Leibler divergence from the baseline in nats, 95 %", _significant),
    "kl_median": Words("median KL", "in nats", _significant),
    "kl_p99": Words("99 % KL", "in nats", _significant),
    "kl_p999": Words("99.9 % KL", "in nats", _significant),
    "top1_agreement": Words("top-1 agreement", "share of tokens with the same most likely token", _share),
    "delta_p_mean": Words("mean Δp", "mean change of the correct token's probability", _signed),
    "delta_p_rms": Words("RMS Δp", "root mean square change of the correct token's probability", _significant),
    "perplexity_ratio": Words("perplexity ratio", "candidate's over the baseline's", _three),
}
TABLES: dict[str, tuple[str, ...]] = {
    "Scores": (
        *("instances", "missing_candidate", "score", "standard_error", "score_before", "recovery", "difference"),
        *("lost", "gained", "flips", "p_value", "minimum_detectable"),
    ),
    "Answers": (
        *("logprob_change", "unparsable_before", "unparsable", "tokens_before", "tokens", "length_ratio"),
        *("missing_baseline", "missing_candidate"),
    ),
    "Size and speed": (
        *("bits_per_weight", "bits_per_compressed_weight"),
        *("bits_per_cache_element", "bits_per_k_element", "bits_per_v_element"),
        *("weight_bytes_device", "weight_bytes_host", "weight_bytes_disk"),
        *("cache_bytes_device", "cache_bytes_host", "cache_bytes_disk", "tokens_per_second", "limit_share"),
    ),
    "Fidelity": (
        *("kl_mean", "kl_median", "kl_p99", "kl_p999", "top1_agreement", "delta_p_mean", "delta_p_rms", "perplexity_ratio"),
    ),
}
"""Figures by table. The last two tables have a line for each configuration, the others one for each run too."""
OF_ENGINES = ("Size and speed", "Fidelity")
NOT_OF_BASELINE = "this is the baseline"


def labels(scenarios: Iterable[str]) -> dict[str, str]:
    """Return a shorter name of each run entry, without names of arguments and without the method, as far as all differ.

    ``mmlu:subject=anatomy,method=multiple_choice_joint`` becomes ``mmlu anatomy``.
    """
    full = list(scenarios)
    shortened = [_label(name) for name in full]
    taken = Counter(shortened)
    return {name: label if taken[label] == 1 else name for name, label in zip(full, shortened, strict=True)}


def _label(name: str) -> str:
    scenario, _, arguments = name.partition(":")
    parts = [part.rpartition("=") for part in arguments.split(",") if not part.startswith("method=")]
    return " ".join([scenario, *(value for _, _, value in parts if value)])


def written(figure: str, value: float, low: float, high: float) -> str:
    """Return a figure with its interval as text; a dash where it is missing."""
    if pd.isna(value):
        return ABSENT
    write = FIGURES[figure].write
    bounds = "" if pd.isna(low) else ", ".join(write(bound).removesuffix(" %") for bound in (low, high))
    return f"{write(value)} [{bounds}]" if bounds else write(value)
