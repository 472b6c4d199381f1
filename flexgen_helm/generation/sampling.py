"""Choosing tokens: greedy, nucleus sampling, and random numbers that belong to a request.

Every function works on one row of logits at a time, in float64, so that a token never depends on which other
sequences share its row, block or process.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.types import TokenLogprob

GREEDY_TEMPERATURE = 1e-3
"""At this temperature and below the most likely token is taken; HELM sends 1e-4 where it means 0."""


class UniformStream:
    """The random numbers of one completion: a function of (prompt token ids, seed, completion, step) alone.

    The prompt is hashed once, each step costs one short hash.
    """

    def __init__(self, prompt_token_ids: Sequence[int], seed: int | None, completion: int) -> None:
        """Hash what the whole completion shares.

        Args:
            prompt_token_ids: Token ids of the prompt.
            seed: Any integer; None is 0.
            completion: Index of the completion among those of its job.
        """
        number = seed or 0
        seed_bytes = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
        self._hash = hashlib.blake2b(digest_size=8)
        # Lengths come first, so that no two different arguments share an encoding.
        self._hash.update(struct.pack(f"<Q{len(prompt_token_ids)}I", len(prompt_token_ids), *prompt_token_ids))
        self._hash.update(struct.pack("<Q", len(seed_bytes)) + seed_bytes)
        self._hash.update(struct.pack("<Q", completion))

    def at(self, step: int) -> float:
        """Return the number for generated token ``step``, uniform in [0, 1)."""
        digest = self._hash.copy()
        digest.update(struct.pack("<Q", step))
        return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53


def most_likely(logits: Tensor) -> list[int | None]:
    """Return the most likely token of each row, the lowest id on ties; None where a row holds NaN or +inf, or -inf alone.

    Args:
        logits: Shape ``[n, V]``. -inf is the logit of a token that the model suppresses.
    """
    best, token_ids = logits.max(dim=-1)
    pairs = zip(token_ids.tolist(), best.isfinite().tolist(), strict=True)
    return [int(token_id) if finite else None for token_id, finite in pairs]


def greedy(logits: Tensor) -> list[int]:
    """Return the most likely token of each row, the lowest id on ties.

    Args:
        logits: Shape ``[n, V]``.

    Raises:
        UnsupportedModel: A row holds NaN or +inf.
    """
    _check_finite(logits.amax(dim=-1))
    return [token_id for token_id in most_likely(logits) if token_id is not None]


def choose(logits: Tensor, *, temperature: float, top_p: float, u: float) -> int:
    """Return the next token of one sequence.

    Sampling inverts the cumulative distribution of the nucleus in token-id order: in order of probability a change
    of one rounding error could swap two tokens and with them the answer.

    Args:
        logits: Raw logits, shape ``[V]``.
        temperature: Greedy at ``GREEDY_TEMPERATURE`` and below.
        top_p: The nucleus is the smallest set of most likely tokens whose probability reaches this, in (0, 1].
        u: Random number in [0, 1).

    Raises:
        UnsupportedModel: The logits hold NaN or +inf.
    """
    if temperature <= GREEDY_TEMPERATURE:
        return greedy(logits[None])[0]
    _check_finite(logits.max())
    scaled = logits.detach().to("cpu", torch.float64) / temperature
    probs = torch.log_softmax(scaled, dim=-1).exp()
    if top_p < 1.0:
        probs = _keep_nucleus(probs, top_p)
    cdf = probs.cumsum(dim=-1)
    index = int(torch.searchsorted(cdf, u * cdf[-1], right=True))
    # Rounding may push u * total onto the total itself, which lies behind the last token.
    return min(index, int(probs.nonzero()[-1]))


def top_candidates(logprobs: Tensor, n: int) -> list[TokenLogprob]:
    """Return the ``n`` most likely tokens, best first, ties to the lower id.

    Args:
        logprobs: Log-probabilities of one position, shape ``[V]``.
        n: How many, at most V.
    """
    if n == 0:
        return []
    # topk alone leaves open which of equal values it returns.
    threshold = logprobs.topk(n).values[-1]
    candidates = (logprobs >= threshold).nonzero().flatten()
    values, order = logprobs[candidates].sort(descending=True, stable=True)
    pairs = zip(candidates[order[:n]].tolist(), values[:n].tolist(), strict=True)
    return [TokenLogprob(token_id, logprob) for token_id, logprob in pairs]


def _keep_nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero every probability outside the nucleus; ``probs`` has shape ``[V]`` and float64."""
    # All tokens below this bound together hold less than 1 - top_p, so none belongs to the nucleus: most of a
    # vocabulary need not be sorted.
    candidates = (probs >= (1.0 - top_p) / probs.numel()).nonzero().flatten()
    ranked, order = probs[candidates].sort(descending=True, stable=True)
    reached = ranked.cumsum(dim=-1)[:-1] >= top_p
    kept = candidates[order[: len(order) - int(reached.sum())]]
    return torch.zeros_like(probs).index_copy_(0, kept, probs[kept])


def _check_finite(best: Tensor) -> None:
    """Refuse logits whose maxima are NaN or infinite; a maximum is NaN as soon as one entry is."""
    if not bool(best.isfinite().all()):
        raise UnsupportedModel(
            "The model's logits are not finite numbers, because its activations overflow in this dtype or its "
            'weights are damaged. Load it with dtype="float32" or "bfloat16", or fetch the checkpoint again.'
        )
