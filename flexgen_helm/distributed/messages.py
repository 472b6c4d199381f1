"""What stages of a pipeline tell each other, as plain data. The first stage plans sweeps; the last one answers them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexgen_helm import errors
from flexgen_helm.errors import FlexGenError, JobFailed
from flexgen_helm.generation.replies import Question, Reply
from flexgen_helm.kv_cache.pages import Form, PageStorage
from flexgen_helm.schedule.rows import Continuation, LogitRequest, Row, Segment, Sweep


@dataclass(frozen=True)
class Build:
    """Make this stage's part of an engine."""

    arguments: Any
    """The runtime's `EngineArguments`."""


@dataclass(frozen=True)
class SweepOrder:
    """Compute a sweep."""

    number: int
    """Sweeps are numbered in the order in which every stage computes them."""
    rows: tuple[Row, ...]
    """Rows without the work to which they belong."""
    pages: Mapping[Form, PageStorage]
    answered: int = -1
    """The last sweep that was answered; -1: none was."""
    questions: tuple[Question, ...] = ()
    """For the last stage: what is asked of all logits, in the order of the rows."""

    @property
    def sweep(self) -> Sweep:
        """The sweep."""
        return Sweep(list(self.rows), self.pages)


@dataclass(frozen=True)
class SweepReply:
    """What the last stage answers to a sweep."""

    number: int
    replies: tuple[Reply, ...] = ()
    bad: tuple[tuple[int, int], ...] = ()
    """Row and segment of the tokens whose K or V was not finite."""
    failed: bool = False
    """Whether it could not be computed; the stage that is to blame tells why."""


@dataclass(frozen=True)
class SweepError:
    """Why a stage could not compute a sweep."""

    number: int
    stage: int
    kind: str
    """Name of the class of the error."""
    text: str

    @classmethod
    def of(cls, number: int, stage: int, error: BaseException) -> SweepError:
        """Describe an error of a stage."""
        return cls(number, stage, type(error).__name__, str(error) or type(error).__name__)

    def error(self, stage: str) -> FlexGenError:
        """Return the error, told as one of a stage."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, FlexGenError):
            return kind(f"{stage}: {self.text}")
        return JobFailed(f"{stage} failed in code ({self.kind}: {self.text}).")


@dataclass(frozen=True)
class Close:
    """Let go of the engine."""


@dataclass(frozen=True)
class End:
    """End this process: there will be no further engine."""


Message = Build | SweepOrder | SweepReply | SweepError | Close | End


def bytes_of(message: Message) -> Tensor:
    """Return a message as uint8 ``[n]``."""
    return torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)


def message_of(content: Tensor) -> Message:
    """Return the message that `bytes_of` made bytes of."""
    message: Message = pickle.loads(content.numpy().tobytes())
    return message


def plain_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return rows without the work to which they belong."""
    return tuple(replace(row, segments=[_plain(segment) for segment in row.segments]) for row in rows)


def _plain(segment: Segment) -> Segment:
    requests = [LogitRequest(request.offset, (), ()) for request in segment.logit_requests]
    return replace(segment, logit_requests=requests, owner=None)


def watched(rows: Sequence[Row]) -> None:
    """Give every segment an owner of its own, which is told if its tokens are not finite."""
    for row in rows:
        for segment in row.segments:
            segment.owner = Continuation(0)


def not_finite(rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Yield row and segment of the tokens of `watched` rows that were not finite."""
    for k, row in enumerate(rows):
        for index, segment in enumerate(row.segments):
            if segment.owner is not None and not segment.owner.finite:
                yield k, index


def mark(rows: Sequence[Row], bad: Sequence[tuple[int, int]]) -> None:
    """Tell the owners of tokens that these were not finite."""
    for k, index in bad:
        owner = rows[k].segments[index].owner
        if owner is not None:
            owner.finite = False
