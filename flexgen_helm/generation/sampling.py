"""Choose tokens from logits: the most likely one, or nucleus sampling with random numbers that belong to one completion.

Each sequence is sampled on its own, in float64 on the CPU, so that its tokens never depend on which other sequences are in the
batch.
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
"""Decoding is greedy at this temperature and below. HELM sends 1e-4 where it means 0."""


class UniformStream:
    """Random numbers of one completion, a pure function of prompt token ids, seed, completion index and step.

    The prompt is hashed once; each step costs one short hash.
    """

    def __init__(self, prompt_token_ids: Sequence[int], seed: int | None, completion: int) -> None:
        """Hash the arguments, which all steps share.

        Args:
            prompt_token_ids: Token ids of the prompt.
            seed: Any integer. None means 0.
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
        """Return the random number for generated token ``step`` (the first is 0), uniform in [0, 1)."""
        digest = self._hash.copy()
        digest.update(struct.pack("<Q", step))
        return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53


def most_likely(logits: Tensor) -> list[int | None]:
    """Return the most likely token of each row; ties go to the lowest id.

    Args:
        logits: ``[n, V]`` for n sequences and V tokens. A token that the model suppresses has the logit -inf.

    Returns:
        One token id for each row. None marks a row without a finite maximum: it holds NaN or +inf, or nothing but -inf.
    """
    best, token_ids = logits.max(dim=-1)
    pairs = zip(token_ids.tolist(), best.isfinite().tolist(), strict=True)
    return [int(token_id) if finite else None for token_id, finite in pairs]


def choose(logits: Tensor, *, temperature: float, top_p: float, u: float) -> int:
    """Return the next token of one sequence.

    Sampling inverts the cumulative distribution of the nucleus in the order of token ids. In the order of probability, a
    rounding error could swap two tokens and so change the answer.

    Args:
        logits: ``[V]``, as the model returned them.
        temperature: Divides the logits. At ``GREEDY_TEMPERATURE`` and below, the most likely token is returned.
        top_p: The nucleus is the smallest set of most likely tokens whose probabilities add up to at least this, in (0, 1].
        u: Random number in [0, 1). It is not used at ``GREEDY_TEMPERATURE`` and below.

    Raises:
        UnsupportedModel: If the logits hold NaN or +inf, or nothing but -inf.
    """
    _check_finite(logits.max())
    if temperature <= GREEDY_TEMPERATURE:
        best = most_likely(logits[None])[0]
        assert best is not None  # checked above
        return best
    scaled = logits.detach().to("cpu", torch.float64) / temperature
    probs = torch.log_softmax(scaled, dim=-1).exp()
    if top_p < 1.0:
        probs = _keep_nucleus(probs, top_p)
    cdf = probs.cumsum(dim=-1)
    index = int(torch.searchsorted(cdf, u * cdf[-1], right=True))
    # Rounding may make u * total equal to the total, which is past the last token.
    return min(index, int(probs.nonzero()[-1]))


def top_candidates(logprobs: Tensor, n: int) -> list[TokenLogprob]:
    """Return the ``n`` most likely tokens, best first; ties go to the lower id.

    Args:
        logprobs: ``[V]`` log-probabilities (in nats) of one position.
        n: Number of tokens, from 0 to V.
    """
    if n == 0:
        return []
    # topk does not promise which of several equal values it returns.
    threshold = logprobs.topk(n).values[-1]
    candidates = (logprobs >= threshold).nonzero().flatten()
    values, order = logprobs[candidates].sort(descending=True, stable=True)
    pairs = zip(candidates[order[:n]].tolist(), values[:n].tolist(), strict=True)
    return [TokenLogprob(token_id, logprob) for token_id, logprob in pairs]


def _keep_nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero every probability outside the nucleus; ``probs`` has shape ``[V]`` and float64."""
    # All tokens below this bound together have a probability of less than 1 - top_p, so none is in the nucleus. So most of
    # the vocabulary need not be sorted.
    candidates = (probs >= (1.0 - top_p) / probs.numel()).nonzero().flatten()
    ranked, order = probs[candidates].sort(descending=True, stable=True)
    reached = ranked.cumsum(dim=-1)[:-1] >= top_p
    kept = candidates[order[: len(order) - int(reached.sum())]]
    return torch.zeros_like(probs).index_copy_(0, kept, probs[kept])


def _check_finite(best: Tensor) -> None:
    """Refuse logits whose maximum ``best`` is NaN or infinite. The maximum is NaN if any entry is NaN."""
    if not bool(best.isfinite().all()):
        raise UnsupportedModel(
            "The model's logits are not finite numbers, because its activations overflow in this dtype or its "
            'weights are damaged. Load it with dtype="float32" or "bfloat16", or fetch the checkpoint again.'
        )
