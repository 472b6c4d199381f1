"""Self-check of packed rows: sequences packed, cut and continued are compared with each of them alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen_helm.attention.paged.trial import HeadShape
from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.execution.serial import SerialExecutor
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, Form, PageCounts, PageStorage, num_pages
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.rows import self_check
from flexgen_helm.rows.packed import PackedRows
from flexgen_helm.rows.self_check import TOLERANCE, Cuts, FirstLayers, LayerCache, Tokens, Verdict
from flexgen_helm.schedule.rows import Segment, Sweep, pack_decode, pack_prefill
from flexgen_helm.schedule.tree import Node
from flexgen_helm.types import ResolvedPolicy

FAR_POSITION = 16_384
"""Largest position of the neighbour that must not change a sequence."""
CUTS: Cuts = ((21, 11), (13, 12))
"""Sequences that are packed into one row and continued in the next rows in the other order; a last token in a decode row."""
LONG_CUTS: Cuts = ((300, 187), (29, 7), (200, 199), (130, 129))
"""Sequences of which some have several chunks of keys, for the first layers only."""


def check_packed(model: RecordedModel, policy: ResolvedPolicy, *, max_length: int, first: FirstLayers | None = None) -> Verdict:
    """Compare packed and continued sequences with transformers' own forward.

    16-bit models are compared in fp32, on their first layers (`self_check.in_fp32`).

    Raises:
        UnsupportedModel: If they differ, or if the model does anything that packed rows do not support.
    """
    with self_check.as_refusal():
        exact = self_check.in_fp32(model, first)
        cache = PagedCache()
        worst, heads = _difference(exact, policy, max_length, cache)
        if exact is not model:
            cache = PagedCache()
            rows = PackedRows(model, cache, heads=heads)
            for tokens in self_check.random_sequences(model, CUTS, max_length):
                self_check.require_numbers(_run(rows, policy, _whole(tokens)))
        stable = _bit_stable(model, policy, max_length, heads)
        sizes = sorted(cache.bytes_per_token.items())
        calls = [tuple(size for key, size in sizes if key.layer == j) for j in range(len(model.layers))]
        return Verdict(worst, stable, tuple(map(LayerCache, calls)), heads)


def _difference(
    model: RecordedModel, policy: ResolvedPolicy, max_length: int, cache: PagedCache
) -> tuple[float, tuple[HeadShape, ...]]:
    """Compare with transformers' own forward; returns the largest difference, and the heads of the model's attention calls."""
    sequences = self_check.random_sequences(model, CUTS, max_length)
    expected = self_check.plain_logprobs(model, sequences)
    worst = self_check.worst_difference(expected, _packed(PackedRows(model, PagedCache()), policy, sequences, CUTS))
    if worst > TOLERANCE:
        raise UnsupportedModel(
            f"packed and continued sequences differ from transformers' own forward by {worst:.3g} in log-probability "
            f"(tolerance {TOLERANCE:g}): the model keeps state other than K and V, or takes positions from elsewhere than "
            "position_ids"
        )
    rows = PackedRows(model, cache)
    moved = self_check.worst_difference([expected[1]], [_beside_far_neighbour(rows, policy, sequences[1], max_length)])
    if moved > TOLERANCE:
        raise UnsupportedModel(
            f"a far position of another sequence in the row changes a sequence's log-probabilities by {moved:.3g}"
        )
    return max(worst, moved), rows.heads


def _bit_stable(model: RecordedModel, policy: ResolvedPolicy, max_length: int, heads: tuple[HeadShape, ...]) -> bool:
    """Return whether neither neighbours nor cuts change a bit (level B), over several chunks of keys, on the first layers."""
    with self_check.first_layers(model) as few:
        sequences = self_check.random_sequences(few, LONG_CUTS, max_length)
        rows = PackedRows(few, PagedCache(), heads=heads)
        packed = _packed(rows, policy, sequences, LONG_CUTS)
        cuts = zip(sequences, self_check.cut_points(sequences, LONG_CUTS), strict=True)
        # A last token is computed by other kernels if it is decoded, so it is decoded in both cases.
        alone = [
            _packed(rows, policy, [tokens], [(len(tokens), cut)])
            if cut == len(tokens) - 1
            else _run(rows, policy, _whole(tokens))
            for tokens, cut in cuts
        ]
    self_check.require_numbers(packed)
    return all(torch.equal(a, b) for a, (b,) in zip(packed, alone, strict=True))


def _packed(rows: PackedRows, policy: ResolvedPolicy, sequences: list[Tokens], cuts: Cuts) -> list[Tensor]:
    """Return log-probabilities ``[compared, vocab]`` of sequences that are packed, cut, and continued in later rows."""
    points = list(enumerate(self_check.cut_points(sequences, cuts)))
    first = _segments(sequences, [(i, 0, point) for i, point in points])
    second = _segments(sequences, [(i, point, len(sequences[i])) for i, point in reversed(points)])
    parts = _run(rows, policy, first, second)
    return [torch.cat(pair) for pair in zip(parts[: len(first)], reversed(parts[len(first) :]), strict=True)]


def _segments(sequences: list[Tokens], cuts: list[tuple[int, int, int]]) -> list[Segment]:
    """Return a segment for each cut (sequence, start, end); each sequence has pages of its own."""
    size = max(num_pages(0, len(tokens)) for tokens in sequences)
    tables = [list(range(i * size, (i + 1) * size)) for i in range(len(sequences))]
    logit_requests = [self_check.compared_requests(len(sequences[i]), a, b) for i, a, b in cuts]
    return [
        Segment(sequences[i][a:b], a, tables[i], logit_requests=requested)
        for (i, a, b), requested in zip(cuts, logit_requests, strict=True)
    ]


def _whole(tokens: Tokens) -> list[Segment]:
    return _segments([tokens], [(0, 0, len(tokens))])


def _run(rows: PackedRows, policy: ResolvedPolicy, first: list[Segment], second: Sequence[Segment] = ()) -> list[Tensor]:
    """Run segments in one sweep, the second ones in rows of their own: decode rows if they are single tokens.

    Returns:
        Log-probabilities of each segment that asks for any, in order; NaN if K or V of a token was not finite.
    """
    owners = [Node(None, segment.start, segment.tokens) for segment in (*first, *second)]
    for segment, owner in zip((*first, *second), owners, strict=True):
        segment.owner = owner
    several = [segment for segment in second if len(segment.tokens) > 1]
    single = [segment for segment in second if len(segment.tokens) == 1]
    packed = pack_prefill(first, policy) + pack_prefill(several, policy) + pack_decode(single, policy)
    num_kept = 1 + max(page for row in packed for segment in row.segments for page in segment.table)
    pages: dict[Form, PageStorage] = {"exact": PageStorage(PageCounts(num_kept))}
    found = self_check.sweep_logprobs(SerialExecutor(rows, head_slice=policy.gpu_batch_size), Sweep(packed, pages))
    if not all(owner.finite for owner in owners):
        found = [torch.full_like(logprobs, torch.nan) for logprobs in found]
    asked = [id(segment) for segment in (*first, *several, *single) if segment.logit_requests]
    by_segment = dict(zip(asked, found, strict=True))
    return [by_segment[id(segment)] for segment in (*first, *second) if segment.logit_requests]


def _beside_far_neighbour(rows: PackedRows, policy: ResolvedPolicy, tokens: Tokens, max_length: int) -> Tensor:
    """Run a short sequence next to one near the end of the context, whose page table repeats one page."""
    near = _whole(tokens)[0]
    start = min(max_length, FAR_POSITION) - 3
    far = Segment(tokens[:3], start, [len(near.table)] * (start // PAGE_TOKENS + 2))
    return _run(rows, policy, [far, near])[0]
