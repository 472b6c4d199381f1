"""From positions to the figures of a comparison, as plain data for JSON."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from flexgen_helm.fidelity.compare import groups_of
from flexgen_helm.fidelity.positions import Positions
from flexgen_helm.fidelity.windows import Windows
from flexgen_helm.statistics.bootstrap import Bootstrap, Estimate

SHARES = {"median": 0.5, "p99": 0.99, "p999": 0.999}
CONFIDENCES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Bounds of the buckets by the reference's confidence; the lower bound belongs to a bucket, and 1 to the last one."""
Plain = dict[str, Any]


def summary(positions: Positions, windows: Windows) -> Plain:
    """Return perplexity, bits per byte, KL divergence, agreement and change of probability, with ``ci95`` of each.

    Args:
        positions: As `compare` returned them for the windows.
        windows: The windows; they say which positions are drawn together.
    """
    draws = Bootstrap(groups_of(windows.windows))
    nll = {"reference": positions.nll_reference, "candidate": positions.nll_candidate}
    estimates: dict[str, Estimate | dict[str, Estimate] | None] = {
        "perplexity": {name: draws.mean(values, after=np.exp) for name, values in nll.items()},
        "perplexity_ratio": draws.mean(positions.nll_candidate - positions.nll_reference, after=np.exp),
        "bits_per_byte": None,
        "kl": {
            "mean": draws.mean(positions.kl),
            **{name: draws.quantile(positions.kl, share) for name, share in SHARES.items()},
        },
        "top1_agreement": draws.mean(positions.agrees),
        "delta_p": {"mean": draws.mean(positions.delta_p), "rms": draws.mean(positions.delta_p**2, after=np.sqrt)},
    }
    if windows.num_bytes:
        # The bytes of each token are unknown, so those of a resample are its tokens' at the average.
        bits = len(positions) / (windows.num_bytes * math.log(2))
        estimates["bits_per_byte"] = {name: draws.mean(values, after=lambda mean: mean * bits) for name, values in nll.items()}
    return {
        **{name: _values(estimate) for name, estimate in estimates.items()},
        "kl_by_confidence": _by_confidence(positions, draws),
        "ci95": {name: _intervals(estimate) for name, estimate in estimates.items()},
    }


def floor(positions: Positions) -> Plain:
    """Return the figures of two computations between which no difference is meant."""
    return {
        "positions": len(positions),
        "kl": {
            "mean": float(positions.kl.mean()),
            **{name: float(np.quantile(positions.kl, share, method="inverted_cdf")) for name, share in SHARES.items()},
        },
        "top1_agreement": float(positions.agrees.mean()),
        "delta_p": {"mean": float(positions.delta_p.mean()), "rms": float(np.sqrt((positions.delta_p**2).mean()))},
    }


def _by_confidence(positions: Positions, draws: Bootstrap) -> list[Plain]:
    buckets = []
    for low, high in pairwise(CONFIDENCES):
        inside = (positions.confidence >= low) & ((positions.confidence < high) | (high == CONFIDENCES[-1]))
        if inside.any():
            kl, agreement = (draws.mean(values, where=inside) for values in (positions.kl, positions.agrees))
            buckets.append(
                {
                    "from": low,
                    "to": high,
                    "positions": int(inside.sum()),
                    "kl_mean": kl.value,
                    "top1_agreement": agreement.value,
                    "ci95": {"kl_mean": kl.interval, "top1_agreement": agreement.interval},
                }
            )
    return buckets


def _values(estimate: Estimate | dict[str, Estimate] | None) -> Any:
    if isinstance(estimate, dict):
        return {name: each.value for name, each in estimate.items()}
    return None if estimate is None else estimate.value


def _intervals(estimate: Estimate | dict[str, Estimate] | None) -> Any:
    if isinstance(estimate, dict):
        return {name: each.interval for name, each in estimate.items()}
    return None if estimate is None else estimate.interval
