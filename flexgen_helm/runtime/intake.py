"""Intake: merges jobs into work for the scheduler and makes results of it.

Equal prompts become one piece of work, and equal completions are generated once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexgen_helm.errors import FlexGenError
from flexgen_helm.generation.completion import CompletionBuilder
from flexgen_helm.generation.detokenizer import token_texts
from flexgen_helm.generation.job_errors import impossible, of_one_job, overflow
from flexgen_helm.generation.prepare import PreparedJob
from flexgen_helm.generation.replies import Draw, Question, Reply, replies
from flexgen_helm.generation.sampling import NEG_INF, UniformStream
from flexgen_helm.generation.vocabulary import Vocabulary
from flexgen_helm.schedule.rows import Continuation, LogitRequest
from flexgen_helm.schedule.work import PromptWork
from flexgen_helm.types import Job, Result, TokenLogprob


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

    @property
    def draw(self) -> Draw | None:
        """How its next token is chosen; None: it is the most likely one."""
        if self.stream is None:
            return None
        return Draw(self.job.temperature, self.job.top_p, self.stream.at(len(self.tokens)))

    def take(self, token: int | FlexGenError | None, logprob: float, top: list[TokenLogprob]) -> None:
        """Append the next token, as `Reply` has it. An error ends this completion and no other.

        Args:
            token: The token; None if the logits are not finite, or the error for which there is none.
            logprob: Its log-probability under the model, before temperature and top_p.
            top: The most likely tokens, at least as many as its job asks for.
        """
        self.finite = self.finite and self.work.finite and token is not None
        self.done = self.done or not self.finite
        if self.done or token is None:
            return
        if isinstance(token, FlexGenError):
            self._fail(token)
            return
        self.tokens.append(token)
        try:
            self.done = self.builder.append(token, logprob, top[: self.job.top_logprobs]) is not None
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.error, self.done = of_one_job(error), True


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
            prompt_is_best=_prompt_is_best(work)[prepared.num_added :] if scored else None,
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
    apply(logit_requests, replies([question(request) for request in logit_requests], logits))


def question(request: LogitRequest) -> Question:
    """Return what a request asks of its logits."""
    generations = _generations(request)
    targets = tuple(scores.tokens[i] for scores, i in request.targets)
    top = max((each.job.top_logprobs for each in generations), default=0)
    return Question(targets, tuple(each.draw for each in generations), top)


def apply(logit_requests: Sequence[LogitRequest], found: Sequence[Reply]) -> None:
    """Give requests what was answered to their questions."""
    for request, reply in zip(logit_requests, found, strict=True):
        for (scores, i), logprob, is_best in zip(request.targets, reply.logprobs, reply.is_best, strict=True):
            scores.logprobs[i], scores.is_best[i] = logprob, is_best
        for generation, token, logprob in zip(_generations(request), reply.tokens, reply.token_logprobs, strict=True):
            generation.take(token, logprob, reply.top)


def _generations(request: LogitRequest) -> list[Generation]:
    found = [continuation for continuation in request.continuations if isinstance(continuation, Generation)]
    assert len(found) == len(request.continuations)
    return found


def _completion_key(prepared: PreparedJob, index: int) -> Hashable:
    """Return everything that decides one completion of a given input; greedy ones do not depend on seed, top_p or index."""
    job = prepared.job
    draw = None if prepared.is_greedy else (job.temperature, job.top_p, job.seed or 0, index)
    return draw, job.max_new_tokens, frozenset(job.stop), job.top_logprobs, job.ignore_eos


def _prompt_is_best(work: PromptWork) -> list[bool]:
    return [value for node in work.node.path() if node.scores is not None for value in node.scores.is_best]


def _prompt_logprobs(work: PromptWork) -> list[float]:
    values = [value for node in work.node.path() if node.scores is not None for value in node.scores.logprobs]
    return [0.0 if value is None else value for value in values]
