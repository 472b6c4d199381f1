"""What two models predict at the same positions, as a few numbers for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexgen_helm.errors import FlexGenError, NotFinite

ROWS = 16
"""Positions whose log-probabilities are in memory at a time, in float64."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Positions:
    """Numbers of N positions, each an array ``[N]`` in float64. Logarithms are natural."""

    nll_reference: Floats
    """Negative log-probability of the correct token under the reference."""
    nll_candidate: Floats
    kl: Floats
    """Kullback-Leibler divergence of the candidate from the reference, sum of p log(p / q), in nats."""
    agrees: Floats
    """1 where both models' most likely token is the same, else 0."""
    delta_p: Floats
    """Probability of the correct token under the candidate minus that under the reference."""
    confidence: Floats
    """Probability of the reference's most likely token."""

    def __len__(self) -> int:
        return len(self.kl)

    @classmethod
    def joined(cls, parts: Sequence[Positions]) -> Positions:
        """Return the positions of all parts, in their order."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def compare_logits(reference: Tensor, candidate: Tensor, targets: Tensor) -> Positions:
    """Compare two models' logits, a few rows at a time in float64.

    Args:
        reference: Logits of the reference, fp32 ``[N, vocab]``.
        candidate: Logits of the candidate at the same positions, fp32 ``[N, vocab]``.
        targets: The correct tokens, ``[N]``.

    Raises:
        FlexGenError: If the logits have different vocabularies.
        NotFinite: If a number is not finite: a model overflows, or the candidate gives probability 0 to what the reference
            holds possible.
    """
    if reference.shape != candidate.shape:
        raise FlexGenError(
            f"The models have logits for {reference.shape[-1]} and {candidate.shape[-1]} tokens. Compare models of the same "
            "vocabulary."
        )
    pieces = zip(reference.split(ROWS), candidate.split(ROWS), targets.split(ROWS), strict=True)
    return Positions.joined([_compared(*piece) for piece in pieces])


def _compared(reference: Tensor, candidate: Tensor, targets: Tensor) -> Positions:
    log_p, log_q = (torch.log_softmax(logits.double(), -1) for logits in (reference, candidate))
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp(min=0.0)  # below 0 by rounding only
    at = targets[:, None]
    right_p, right_q = (each.gather(-1, at)[:, 0] for each in (log_p, log_q))
    agrees = reference.argmax(-1) == candidate.argmax(-1)
    found = Positions(
        *(each.double().numpy() for each in (-right_p, -right_q, kl, agrees, right_q.exp() - right_p.exp(), p.max(-1).values))
    )
    if not all(np.isfinite(getattr(found, field.name)).all() for field in fields(found)):
        raise NotFinite(
            "The models cannot be compared here: logits are not finite, or a token has probability 0. Use another text, or "
            "another dtype if a model overflows in float16."
        )
    return found
