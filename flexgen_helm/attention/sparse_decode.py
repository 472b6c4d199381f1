"""Sparse attention of decode rows on the CPU, in two phases: which keys a query reads, then their values.

Which keys these are, and what keys that are not read count for, says `flexgen_helm.attention.sparse`. A row goes through::

    plans = sparse.plan(pages, rule)                                      # once for all layers of a mask
    choices = sparse.choose(plans, q, forms, scale=scale, softcap=None)   # reads K of sealed chunks, all of it
    choices.rows_of("staged", num_pages)                                  # uint32 [pages, H_kv]: rows of V that phase 2 reads
    merged = sparse.attend(choices, forms)                                # reads these rows, means, and exact chunks

Between the phases V of sealed pages may still be on its way: phase 1 reads K alone, phase 2 no V but the rows that `rows_of`
names, all means, and K and V of exact pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from flexgen_helm.attention.decode import PLACES, DecodeAttention, DecodePlan, LayerForms, Scoring, Sums, add_chunks
from flexgen_helm.attention.kernels import Merged
from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.row_pages import Array, RowPages
from flexgen_helm.attention.visits import Visit
from flexgen_helm.kv_cache.pages import CHUNK_TOKENS, PAGE_TOKENS, Place

SCORED_KEYS = 1 << 15
"""Keys whose scores a thread holds at once, in 4 bytes for each query head: queries that share chunks read K once."""


@dataclass(frozen=True, eq=False)
class SealedPlan:
    """The sealed chunks of Q queries of a decode row.

    Attributes:
        chunks: The C distinct chunks and their V visits.
        visitors: ``[V]``: which of the Q queries visits.
        places: ``[V]``: which of the query's sealed chunks, by position, it visits.
        rows: ``[Q]``: the row position of each query.
        starts: ``[Q + 1]``: keys of all queries before each, whether the mask shows them or not.
        order: The chunk of each of the queries' sealed chunks, query after query, in order of position.
        shown: bool: for the keys of each query, one after the other, whether its mask shows them. Empty: it shows all.
        wanted: ``[Q]``: how many of its keys each query reads.
    """

    chunks: DecodePlan
    visitors: Array
    places: Array
    rows: Array
    starts: Array
    order: Array
    shown: Array
    wanted: Array

    @classmethod
    def of(cls, chunks: DecodePlan, percent: int) -> SealedPlan:
        """Sort the visits of sealed chunks by query.

        Args:
            chunks: The chunks.
            percent: See `SparseDecode`.
        """
        rows, visitors, counts = np.unique(chunks.rows, return_inverse=True, return_counts=True)
        by_query = np.argsort(chunks.rows, kind="stable")
        begins = np.cumsum(counts) - counts
        places = np.empty_like(by_query)
        places[by_query] = np.arange(len(by_query)) - np.repeat(begins, counts)
        keys, shown = CHUNK_TOKENS * counts, chunks.masks[by_query].ravel() if len(chunks.masks) else chunks.masks.ravel()
        seen = np.add.reduceat(shown, CHUNK_TOKENS * begins, dtype=np.int64) if len(shown) else keys
        order = np.repeat(np.arange(len(chunks.pages)), np.diff(chunks.begins))[by_query]
        starts = np.array([0, *np.cumsum(keys)])
        return cls(chunks, visitors, places, rows, starts, order, shown, -(-seen * percent // 100))


class SparsePlan(NamedTuple):
    """What some queries of a decode row read.

    Attributes:
        sealed: Their sealed chunks, in groups of queries whose keys are scored together.
        exact: Their own chunks, which are behind these.
    """

    sealed: list[SealedPlan]
    exact: DecodePlan


class Chosen(NamedTuple):
    """What the queries of a `SealedPlan` read, see `flexgen_helm.attention.sparse_decode_kernel.choose_keys`.

    Attributes:
        bits: uint32: for each query and head, of each page of its sealed chunks which keys it reads.
        weights: fp32: for each query and head, page after page the weights of these keys, then the sum of the others.
    """

    bits: Array
    weights: Array


@dataclass(frozen=True, eq=False)
class Choices:
    """What all queries of a row read in a layer.

    Attributes:
        plans: The row's plans.
        queries: fp32 ``[T, H, D]``.
        num_kv: Number of K/V heads.
        scoring: How products become scores.
        sums: Largest scores and sums of weights of the sealed chunks; values are not summed yet.
        chosen: For each plan, what its groups of queries read.
    """

    plans: list[SparsePlan]
    queries: Array
    num_kv: int
    scoring: Scoring
    sums: Sums
    chosen: list[list[Chosen]]

    def rows_of(self, place: Place, num_pages: int) -> Array:
        """Return the rows of V that any query reads of the sealed pages at a place.

        Args:
            place: The place.
            num_pages: Pages there; staged ones are numbered as in `flexgen_helm.attention.row_pages.RowPages.staged`.

        Returns:
            uint32 ``[num_pages, H_kv]``: bit t is 1 for the row of a page's token t.
        """
        from flexgen_helm.attention.sparse_decode_kernel import unite_rows

        union = np.zeros((num_pages, self.num_kv), np.uint32)
        for plan, chosen in zip(self.plans, self.chosen, strict=True):
            for group, found in zip(plan.sealed, chosen, strict=True):
                here = group.chunks.places == PLACES.index(place)
                unite_rows(found.bits, group.starts, group.order, here, group.chunks.pages, union)
        return union


class SparseDecode:
    """Computes sparse attention of decode rows in the threads of a `DecodeAttention`."""

    def __init__(self, decode: DecodeAttention, percent: int) -> None:
        """Start nothing.

        Args:
            decode: Has the threads.
            percent: Keys of earlier chunks, of those that the mask shows, of which each query head reads V, in a hundred.
        """
        self._decode, self._percent = decode, percent

    def plan(self, pages: RowPages, rule: MaskRule) -> list[SparsePlan]:
        """Plan a row's attention, in as many parts as queries are divided into."""
        return [self._plan(pages, rule, visits) for visits in self._decode.divided(pages)]

    def _plan(self, pages: RowPages, rule: MaskRule, visits: list[Visit]) -> SparsePlan:
        exact = DecodePlan.of(pages, rule, [visit for visit in visits if visit.form == "exact"])
        groups = (DecodePlan.of(pages, rule, group) for group in _groups(visit for visit in visits if visit.form == "sealed"))
        return SparsePlan([SealedPlan.of(group, self._percent) for group in groups if len(group.rows)], exact)

    def choose(
        self,
        plans: list[SparsePlan],
        q: Tensor,
        forms: LayerForms,
        *,
        scale: float,
        softcap: float | None,
    ) -> Choices:
        """Choose what all queries of a row read of their sealed chunks.

        Args:
            plans: The row's plans.
            q: ``[T, H, D]`` in host memory.
            forms: The layer's pages by form. Only K of sealed pages is read.
            scale: Factor of the scores.
            softcap: See `flexgen_helm.attention.kernels.attend_chunk`.
        """
        queries = q.float().contiguous().numpy()
        sums, num_kv = Sums.zeros(queries, forms), forms["exact"].any_format.k.num_heads
        choices = Choices(plans, queries, num_kv, {"scale": scale, "softcap": softcap}, sums, [])
        choices.chosen.extend(
            self._decode.in_threads(lambda plan: [_choose(group, choices, forms) for group in plan.sealed], plans)
        )
        return choices

    def num_bytes(self, plan: SparsePlan, forms: LayerForms) -> int:
        """Bytes of K and V that are read, as if all queries of a chunk and all heads chose the same keys."""
        num_bytes = plan.exact.num_bytes(forms)
        if plan.sealed:
            form = forms["sealed"].any_format
            page = form.num_bytes - form.v.num_bytes * (100 - self._percent) // 100
            num_bytes += sum(group.chunks.pages.size for group in plan.sealed) * page
        return num_bytes

    def attend(self, choices: Choices, forms: LayerForms) -> Merged:
        """Attend with all queries of a row.

        Args:
            choices: What they read. Used up.
            forms: As for `choose`; all is read that the module names.
        """
        self._decode.in_threads(partial(_attend, choices, forms), range(len(choices.plans)))
        return choices.sums.merged()


def _groups(visits: Iterator[Visit]) -> Iterator[list[Visit]]:
    """Groups of queries, with the visits of each; a group ends when it has `SCORED_KEYS`."""
    group: list[Visit] = []
    for _, of_query in itertools.groupby(visits, key=lambda visit: visit.offset):
        group += of_query
        if len(group) * CHUNK_TOKENS >= SCORED_KEYS:
            yield group
            group = []
    if group:
        yield group


def _choose(plan: SealedPlan, choices: Choices, forms: LayerForms) -> Chosen:
    # Numba takes most of a second to import, which an engine that only loads does not spend.
    from flexgen_helm.attention.sparse_decode_kernel import choose_keys

    k, heads, scoring = plan.chunks.locate(forms, "k"), choices.queries.shape[1], choices.scoring
    num_pages = int(plan.starts[-1]) // PAGE_TOKENS
    chosen = Chosen(np.empty(heads * num_pages, np.uint32), np.empty(heads * (num_pages + int(plan.wanted.sum())), np.float32))
    choose_keys(
        *(choices.queries, k.addresses, k.kinds, k.head_bytes, choices.num_kv, plan.chunks.begins),
        *(plan.visitors, plan.places, plan.rows, plan.starts, plan.shown, plan.wanted),
        *(np.float32(scoring["scale"]), np.float32(scoring["softcap"] or 0.0), tuple(chosen), *choices.sums[:2]),
    )
    return chosen


def _attend(choices: Choices, forms: LayerForms, i: int) -> None:
    from flexgen_helm.attention.sparse_decode_kernel import attend_chosen

    sums = choices.sums
    for plan, chosen in zip(choices.plans[i].sealed, choices.chosen[i], strict=True):
        v, means = plan.chunks.locate(forms, "v"), plan.chunks.locate(forms, "mean")
        attend_chosen(
            *(v.addresses, means.addresses, *(np.stack(x, 1) for x in zip(v[1:], means[1:], strict=True))),
            *(choices.num_kv, plan.order, plan.rows, plan.starts, plan.wanted, tuple(chosen), sums.total),
        )
    add_chunks(choices.plans[i].exact, queries=choices.queries, forms=forms, sums=sums, **choices.scoring)
