"""Rows: the tokens of many sequences side by side, always the same number of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress
from typing import Literal, NamedTuple, TypeVar

from flexgen_helm.kv_cache.pages import Form, PageStorage
from flexgen_helm.schedule.tree import Node, Scores, SequencePages
from flexgen_helm.types import ResolvedPolicy

AnyRow = TypeVar("AnyRow")


@dataclass(eq=False)
class State:
    """The cache that a single row's sequence carries from one sweep to the next. It lives as long as this object."""

    origin: State | None = None
    """It begins with a copy of this one's content; None: with nothing."""
    content: object = None
    """The runtime's; nothing here looks into it."""


@dataclass(eq=False)
class Continuation:
    """One completion of a prompt: the tokens generated so far, and the cache that it carries from one sweep to the next.

    Whoever makes completions chooses their tokens.
    """

    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    pages: SequencePages | None = None
    """In packed rows: pages of its own K and V; None: it has none now."""
    state: State | None = None
    """In single rows: its cache."""
    finite: bool = True
    """Whether K, V and logits of its own tokens were finite numbers."""


class LogitRequest(NamedTuple):
    """A position of a row whose logits are needed."""

    offset: int
    """Tokens before it in the row."""
    targets: tuple[tuple[Scores, int], ...]
    """(scores, i): the log-probability of ``scores.tokens[i]`` is read here and stored in ``scores.logprobs[i]``."""
    continuations: tuple[Continuation, ...]
    """Completions whose next token is chosen here."""


@dataclass
class Segment:
    """Consecutive tokens of one sequence within a row."""

    tokens: tuple[int, ...]
    start: int
    """Absolute position of the first token."""
    table: list[int] = field(default_factory=list)
    """Pages of the sequence from position 0 on."""
    copy: tuple[int, int, int] | None = None
    """See `SequencePages.copy`."""
    exact: list[int] | None = None
    """Exact pages of the sequence, by position like ``table``, up to the end; only those of chunks in which its tokens lie are
    its own still. None: ``table`` has exact pages, since nothing is sealed."""
    logit_requests: list[LogitRequest] = field(default_factory=list)
    """`LogitRequest.offset` counts from the segment's first token here, from the row's first token in `Row.logit_requests`."""
    state: State | None = None
    """In single rows, instead of pages."""
    owner: Node | Continuation | None = None
    """The tokens are its own, and it is told if they are not finite; None: nobody asks."""

    @property
    def end(self) -> int:
        """Absolute position behind the last token."""
        return self.start + len(self.tokens)


@dataclass
class Row:
    """A GPU batch: ``size`` tokens, of which the segments fill the first; the rest is padding."""

    kind: Literal["prefill", "decode"]
    size: int
    segments: list[Segment] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(len(segment.tokens) for segment in self.segments)

    def logit_requests(self) -> Iterable[LogitRequest]:
        """All positions whose logits are needed, counted from the row's first token."""
        offset = 0
        for segment in self.segments:
            for request in segment.logit_requests:
                yield request._replace(offset=request.offset + offset)
            offset += len(segment.tokens)

    def mark(self, bad: Iterable[int]) -> None:
        """Note whose tokens were not finite.

        Args:
            bad: Tokens, counted from the row's first; padding may be among them.
        """
        ends = list(accumulate(len(segment.tokens) for segment in self.segments))
        for i in {bisect_right(ends, token) for token in bad} - {len(ends)}:
            owner = self.segments[i].owner
            if owner is not None:
                owner.finite = False


@dataclass
class Sweep:
    """One pass over all layers: its rows, a prefix always before what continues it."""

    rows: list[Row]
    pages: Mapping[Form, PageStorage] = field(default_factory=dict)
    """Storage of pages that must be there, by their form."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of prefill rows that are not padding."""
        return sum(row.num_tokens for row in self.rows if row.kind == "prefill")

    @property
    def num_decode_tokens(self) -> int:
        """Sequences that take a step."""
        return sum(row.num_tokens for row in self.rows if row.kind == "decode")


def spread(count: int, share: float) -> list[bool]:
    """Return which of some rows are in a share of them, spread evenly."""
    return [int(share * (i + 1)) > int(share * i) for i in range(count)]


def host_attended(rows: Sequence[Row], share: float) -> frozenset[int]:
    """Return the numbers of the rows for which the CPU attends beside the device: a share of those that decode."""
    decode = [k for k, row in enumerate(rows) if row.kind == "decode"]
    return frozenset(compress(decode, spread(len(decode), share)))


def pack_prefill(segments: Iterable[Segment], policy: ResolvedPolicy) -> list[Row]:
    """Cut segments, in order, into prefill rows of ``policy.gpu_batch_tokens`` tokens."""
    return _pack("prefill", segments, policy.gpu_batch_tokens)


def in_order(prefill: list[AnyRow], decode: list[AnyRow], policy: ResolvedPolicy) -> list[AnyRow]:
    """Return the rows of a sweep in the order in which they are computed.

    Decode rows come first where the CPU attends to them: prompts fill the time for which the device waits. Elsewhere they come
    last: their pages arrive while prompts are computed.
    """
    return decode + prefill if policy.cpu_attention and policy.cache[1] else prefill + decode


def halved(row: Row) -> list[Row]:
    """Cut a row into rows of half its size; the second half may be all padding, and is left out."""
    return _pack(row.kind, row.segments, row.size // 2)


def _pack(kind: Literal["prefill", "decode"], segments: Iterable[Segment], size: int) -> list[Row]:
    rows: list[Row] = []
    free = 0
    for segment in segments:
        done = 0
        while done < len(segment.tokens):
            if free == 0:
                rows.append(Row(kind, size))
                free = size
            count = min(free, len(segment.tokens) - done)
            rows[-1].segments.append(_piece(segment, done, count))
            done, free = done + count, free - count
    return rows


def _piece(segment: Segment, offset: int, count: int) -> Segment:
    if offset == 0 and count == len(segment.tokens):
        return segment
    logit_requests = [
        w._replace(offset=w.offset - offset) for w in segment.logit_requests if offset <= w.offset < offset + count
    ]
    copy = segment.copy if offset == 0 else None
    tokens, start = segment.tokens[offset : offset + count], segment.start + offset
    return Segment(tokens, start, segment.table, copy, segment.exact, logit_requests, owner=segment.owner)


def pack_decode(segments: list[Segment], policy: ResolvedPolicy) -> list[Row]:
    """Cut one-token segments, in order, into decode rows of ``policy.gpu_batch_size`` sequences."""
    return _pack("decode", segments, policy.gpu_batch_size)
