"""Choose tokens from logits: the most likely one, or nucleus sampling with random numbers that belong to one completion.

Each sequence is sampled on its own, in float64 on the CPU, so that its tokens never depend on which other sequences are in the
batch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.memory.copies import upload
from flexgen_helm.types import TokenLogprob

NEG_INF = float("-inf")
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
    found = token_ids.where(best.isfinite(), -1).tolist()
    return [None if token_id < 0 else token_id for token_id in found]


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


def top_candidates(logprobs: Tensor, counts: Sequence[int]) -> list[list[TokenLogprob]]:
    """Return the most likely tokens of each row, best first; ties go to the lower id. Tokens of probability 0 are left out.

    The device is waited for once, and three times more if tokens that are equally likely compete for a place in some row.

    Args:
        logprobs: ``[n, V]`` log-probabilities (in nats) of n positions.
        counts: Number of tokens of each row, from 0 to V.
    """
    vocab = logprobs.shape[-1]
    found = logprobs.topk(min(max(counts) + 1, vocab))
    values, token_ids = torch.stack([found.values.double(), found.indices.double()]).tolist()
    rows = [list(map(TokenLogprob, map(int, ids), row)) for ids, row in zip(token_ids, values, strict=True)]
    # topk does not promise which of several equal values it returns. It returned one more than was asked for, so only tokens
    # that are as likely as its last one may be missing.
    ends = {i: values[i][count - 1] for i, count in enumerate(counts) if count and len(values[i]) < vocab}
    ends = {i: end for i, end in ends.items() if NEG_INF < end == values[i][-1]}
    for i, tied in _tokens_at(logprobs, ends).items():
        rows[i] = [token for token in rows[i] if token.logprob > ends[i]]
        rows[i] += [TokenLogprob(token_id, ends[i]) for token_id in tied[: counts[i]].tolist()]
    possible = [[token for token in row if token.logprob > NEG_INF] for row in rows]
    return [sorted(row, key=_rank)[:count] for row, count in zip(possible, counts, strict=True)]


def take_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows of a tensor, in ascending order; the tensor itself if they are all. The device is not waited for."""
    return x if len(rows) == len(x) else torch.stack([x[row] for row in rows])


def _tokens_at(logprobs: Tensor, wanted: Mapping[int, float]) -> dict[int, Tensor]:
    """Return, for some rows of ``[n, V]`` log-probabilities, all tokens with exactly the wanted one, in ascending order."""
    if not wanted:
        return {}
    values = upload(list(wanted.values()), logprobs.device, logprobs.dtype)
    rows, token_ids = (take_rows(logprobs, list(wanted)) == values[:, None]).nonzero().cpu().unbind(1)
    return dict(zip(wanted, token_ids.split(rows.bincount(minlength=len(wanted)).tolist()), strict=True))


def _rank(token: TokenLogprob) -> tuple[float, int]:
    return -token.logprob, token.token_id


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
