"""What is asked of logits, and what is answered, as plain data: the logits may be elsewhere than those who ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexgen_helm.errors import FlexGenError
from flexgen_helm.generation.job_errors import of_one_job
from flexgen_helm.generation.sampling import NEG_INF, choose, most_likely, take_rows, top_candidates
from flexgen_helm.memory.copies import upload
from flexgen_helm.types import TokenLogprob

ALIGNED = 4
"""fp32 numbers in the 16 bytes at which a GPU's softmax begins to read."""


class Draw(NamedTuple):
    """How a token is sampled; see `flexgen_helm.generation.sampling.choose`."""

    temperature: float
    top_p: float
    u: float


class Question(NamedTuple):
    """What is asked of the logits of one position."""

    targets: tuple[int, ...]
    """Tokens whose log-probabilities are wanted."""
    draws: tuple[Draw | None, ...]
    """One for each completion that goes on here; None: it takes the most likely token."""
    top: int
    """Most likely tokens that are wanted with them."""


class Reply(NamedTuple):
    """What is answered to a `Question`."""

    logprobs: list[float]
    """Log-probabilities of the targets, in nats."""
    is_best: list[bool]
    """Whether no token is more likely than a target."""
    tokens: list[int | FlexGenError | None]
    """The next token of each completion. None: the logits are not finite; or the error that ends it."""
    token_logprobs: list[float]
    """Log-probability of each of these tokens before temperature and top_p; NaN where there is none."""
    top: list[TokenLogprob]
    """The most likely tokens, best first; empty if nothing goes on here."""


def replies(questions: Sequence[Question], logits: Tensor) -> list[Reply]:
    """Answer questions.

    Args:
        questions: One for each row of the logits.
        logits: fp32 ``[len(questions), vocab]``.
    """
    logprobs = _log_softmax(logits)
    tokens = _chosen(questions, logits)
    places = [(row, token) for row, question in enumerate(questions) for token in question.targets]
    steps = [(row, token) for row, found in enumerate(tokens) for token in found if isinstance(token, int)]
    found, best = _at(logprobs, logits, places + steps, num_targets=len(places))
    numbers, bests = iter(found), iter(best)
    of_targets = [[next(numbers) for _ in question.targets] for question in questions]
    are_best = [[bool(next(bests)) for _ in question.targets] for question in questions]
    of_tokens = [[next(numbers) if isinstance(token, int) else float("nan") for token in found] for found in tokens]
    top = _top(logprobs, {row: questions[row].top for row, _ in steps if questions[row].top})
    return [
        Reply(*of_row, top.get(row, [])) for row, of_row in enumerate(zip(of_targets, are_best, tokens, of_tokens, strict=True))
    ]


def _chosen(questions: Sequence[Question], logits: Tensor) -> list[list[int | FlexGenError | None]]:
    """Choose the next tokens of each row. Rows that are sampled are brought to the CPU in one copy."""
    if not any(question.draws for question in questions):
        return [[] for _ in questions]
    best = most_likely(logits)
    rows = [row for row, question in enumerate(questions) if any(question.draws)]
    on_host = dict(zip(rows, take_rows(logits, rows).cpu(), strict=True)) if rows else {}
    return [list(_drawn(question, best[row], on_host.get(row))) for row, question in enumerate(questions)]


def _drawn(question: Question, best: int | None, logits: Tensor | None) -> Iterator[int | FlexGenError | None]:
    """Yield the next token of each completion of a row. An error ends one completion and no other."""
    for draw in question.draws:
        if best is None or draw is None:
            yield best
            continue
        assert logits is not None
        try:
            yield choose(logits, **draw._asdict())
        except Exception as error:
            yield of_one_job(error)


def _at(
    logprobs: Tensor, logits: Tensor, places: list[tuple[int, int]], *, num_targets: int
) -> tuple[list[float], list[float]]:
    """Return the log-probabilities at (row, token) pairs, and 1 where no logit is above that of a target; in one copy.

    Args:
        logprobs: ``[requests, vocab]``.
        logits: ``[requests, vocab]``.
        places: The pairs, targets first.
        num_targets: Number of targets.
    """
    if not places:
        return [], []
    rows, token_ids = upload(places, logprobs.device).unbind(1)
    found = logprobs[rows, token_ids]
    if num_targets:
        rows, token_ids = rows[:num_targets], token_ids[:num_targets]
        found = torch.cat([found, (logits[rows, token_ids] == logits.amax(-1)[rows]).to(found.dtype)])
    numbers: list[float] = found.tolist()
    return numbers[: len(places)], numbers[len(places) :]


def _top(logprobs: Tensor, counts: dict[int, int]) -> dict[int, list[TokenLogprob]]:
    """Return the most likely tokens of some rows."""
    if not counts:
        return {}
    found = top_candidates(take_rows(logprobs, list(counts)), list(counts.values()))
    return dict(zip(counts, found, strict=True))


def _log_softmax(logits: Tensor) -> Tensor:
    """Return the log-probabilities ``[requests, vocab]``.

    A GPU adds up a row from its next multiple of 16 bytes on. So a row that began elsewhere had other bits in another place of
    the slice; tokens of probability 0 make all rows begin there.
    """
    vocab = logits.shape[-1]
    if logits.device.type == "cuda" and vocab % ALIGNED:
        logits = pad(logits, (0, -vocab % ALIGNED), value=NEG_INF)
    return torch.log_softmax(logits, -1)[:, :vocab]
