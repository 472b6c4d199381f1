"""Intake: merges jobs into work for the scheduler and makes results of it.

Equal prompts become one piece of work, and equal completions are generated once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexgen_helm.errors import FlexGenError
from flexgen_helm.generation.completion import CompletionBuilder
from flexgen_helm.generation.detokenizer import token_texts
from flexgen_helm.generation.job_errors import impossible, of_one_job, overflow
from flexgen_helm.generation.prepare import PreparedJob
from flexgen_helm.generation.sampling import UniformStream, choose, most_likely, top_candidates
from flexgen_helm.generation.vocabulary import Vocabulary
from flexgen_helm.memory.copies import upload
from flexgen_helm.schedule.rows import Continuation, LogitRequest
from flexgen_helm.schedule.work import PromptWork
from flexgen_helm.types import Job, Result

NEG_INF = float("-inf")
ALIGNED = 4
"""fp32 numbers in the 16 bytes at which a GPU's softmax begins to read."""


@dataclass(eq=False, kw_only=True)
class Generation(Continuation):
    """A completion while it is generated: chooses and collects its tokens."""

    job: Job
    builder: CompletionBuilder
    stream: UniformStream | None
    """Random numbers in [0, 1) for its samples; None: greedy."""
    work: PromptWork
    """Work of its prompt."""
    error: FlexGenError | None = None
    """Error that ended it; None: it has not failed."""

    def step(self, best: int | None, logits: Tensor, logprobs: Tensor) -> None:
        """Choose the next token. An error ends this completion and no other.

        Args:
            best: Most likely token; None if the logits are not finite.
            logits: fp32 ``[vocab]``.
            logprobs: Log-probabilities of the model, ``[vocab]``.
        """
        self.finite = self.finite and self.work.finite and best is not None
        self.done = self.done or not self.finite
        if best is None or self.done:
            return
        try:
            self.append(_next_token(self, best, logits), logprobs)
        except Exception as error:
            self.error, self.done = of_one_job(error), True

    def append(self, token_id: int, logprobs: Tensor) -> None:
        """Append the next token; ``logprobs`` ``[vocab]`` are the model's at this step, before temperature and top_p."""
        top = top_candidates(logprobs, self.job.top_logprobs) if self.job.top_logprobs else []
        top = [candidate for candidate in top if candidate.logprob > NEG_INF]  # the model suppresses the others
        self.tokens.append(token_id)
        self.done = self.builder.append(token_id, float(logprobs[token_id]), top) is not None


@dataclass(eq=False)
class Ticket:
    """A job on its way through the engine: its work, its completions and the future of its result."""

    prepared: PreparedJob
    future: Future[Result] = field(default_factory=Future)
    work: PromptWork | None = None
    generations: list[Generation] = field(default_factory=list)

    def begin_anew(self) -> None:
        """Forget everything computed for the job, so that it is computed again with the same answer."""
        self.work, self.generations = None, []

    def answered(self) -> bool:
        """Return whether the job is answered; its work may continue for other jobs with the same prompt."""
        scored = not self.prepared.job.score_prompt or (self.work is not None and self.work.scored())
        return scored and all(generation.done for generation in self.generations)


class Intake:
    """Merges tickets into work, and makes results of finished work, for one model."""

    def __init__(
        self,
        vocabulary: Vocabulary | None,
        end_token_ids: frozenset[int],
        *,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """Keep the model's properties that results and errors need.

        Args:
            vocabulary: Vocabulary of the tokenizer; None if there is no tokenizer.
            end_token_ids: Tokens that end a text.
            dtype: Dtype of the model, for errors.
            kv_dtype: Dtype in which K and V are stored, for errors; None: the model's.
        """
        self._vocabulary = vocabulary
        self._end_token_ids = end_token_ids
        self._dtypes = dtype, kv_dtype

    def merge(self, tickets: Iterable[Ticket]) -> list[PromptWork]:
        """Merge tickets into work: one piece for each distinct input. Each ticket then knows its work and completions."""
        works: dict[tuple[int, ...], PromptWork] = {}
        generations: dict[Hashable, Generation] = {}
        for ticket in tickets:
            ids, job = ticket.prepared.input_ids, ticket.prepared.job
            work = works.setdefault(ids, PromptWork(ids, score=False, continuations=[]))
            work.score = work.score or job.score_prompt
            ticket.work = work
            for index in range(job.num_completions if job.max_new_tokens else 0):
                key = (ids, _completion_key(ticket.prepared, index))
                if key not in generations:
                    generations[key] = self._generation(ticket.prepared, index, work)
                    work.continuations.append(generations[key])
                ticket.generations.append(generations[key])
        return list(works.values())

    def result(self, ticket: Ticket) -> Result:
        """Return the result of a ticket whose work is done.

        Raises:
            NotFinite: If a number that the result needs is not finite.
            FlexGenError: If a completion failed.
        """
        prepared, work = ticket.prepared, ticket.work
        assert work is not None
        if not work.finite or not all(generation.finite for generation in ticket.generations):
            raise overflow(*self._dtypes)
        for generation in ticket.generations:
            if generation.error is not None:
                raise generation.error
        scored = prepared.job.score_prompt
        texts = token_texts(self._vocabulary, prepared.prompt_ids) if scored and self._vocabulary else []
        return Result(
            completions=[generation.builder.finish() for generation in ticket.generations],
            prompt_token_ids=list(prepared.prompt_ids),
            prompt_token_texts=texts,
            prompt_logprobs=self._scores(prepared, work) if scored else None,
        )

    def _scores(self, prepared: PreparedJob, work: PromptWork) -> list[float]:
        logprobs = _prompt_logprobs(work)[prepared.num_added :]
        if not all(map(math.isfinite, logprobs)):
            if any(math.isnan(logprob) for logprob in logprobs):
                raise overflow(*self._dtypes)
            position = logprobs.index(NEG_INF)
            raise impossible(prepared.prompt_ids[position], position)
        return logprobs

    def _generation(self, prepared: PreparedJob, index: int, work: PromptWork) -> Generation:
        job, ids = prepared.job, prepared.input_ids
        end_ids = frozenset[int]() if job.ignore_eos else self._end_token_ids
        builder = CompletionBuilder(self._vocabulary, ids, job=job, end_token_ids=end_ids)
        stream = None if prepared.is_greedy else UniformStream(ids, job.seed, index)
        return Generation(max_new_tokens=job.max_new_tokens, job=job, builder=builder, stream=stream, work=work)


def answer(logit_requests: list[LogitRequest], logits: Tensor) -> None:
    """Store the log-probabilities and choose the tokens that need some logits.

    Args:
        logit_requests: Requests, one for each row of the logits.
        logits: fp32 ``[requests, vocab]``.
    """
    logprobs = _log_softmax(logits)
    targets = [(row, scores, i) for row, request in enumerate(logit_requests) for scores, i in request.targets]
    if targets:
        places = [[row, scores.tokens[i]] for row, scores, i in targets]
        picked = logprobs[tuple(upload(places, logits.device).T)].tolist()
        for (_, scores, i), logprob in zip(targets, picked, strict=True):
            scores.logprobs[i] = logprob
    if any(request.continuations for request in logit_requests):
        best = most_likely(logits)
        for row, request in enumerate(logit_requests):
            for continuation in request.continuations:
                continuation.step(best[row], logits[row], logprobs[row])


def _log_softmax(logits: Tensor) -> Tensor:
    """Return the log-probabilities ``[requests, vocab]``.

    A GPU adds up a row from its next multiple of 16 bytes on. So a row that began elsewhere had other bits in another place of
    the slice; tokens of probability 0 make all rows begin there.
    """
    vocab = logits.shape[-1]
    if logits.device.type == "cuda" and vocab % ALIGNED:
        logits = pad(logits, (0, -vocab % ALIGNED), value=NEG_INF)
    return torch.log_softmax(logits, -1)[:, :vocab]


def _next_token(generation: Generation, best: int, logits: Tensor) -> int:
    if generation.stream is None:
        return best
    job = generation.job
    u = generation.stream.at(len(generation.tokens))
    return choose(logits, temperature=job.temperature, top_p=job.top_p, u=u)


def _completion_key(prepared: PreparedJob, index: int) -> Hashable:
    """Return everything that decides one completion of a given input; greedy ones do not depend on seed, top_p or index."""
    job = prepared.job
    draw = None if prepared.is_greedy else (job.temperature, job.top_p, job.seed or 0, index)
    return draw, job.max_new_tokens, frozenset(job.stop), job.top_logprobs, job.ignore_eos


def _prompt_logprobs(work: PromptWork) -> list[float]:
    values = [value for node in work.node.path() if node.scores is not None for value in node.scores.logprobs]
    return [0.0 if value is None else value for value in values]
