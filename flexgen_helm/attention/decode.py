"""Attention of decode rows on the CPU: one pass over the pages, without copies of K and V."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexgen_helm.attention.kernels import NEG_INF, Merged
from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.attention.visits import Visit, row_visits
from flexgen_helm.kv_cache.page_format import PageTensors
from flexgen_helm.kv_cache.pages import CHUNK_TOKENS, Place

PLACES: tuple[Place, ...] = ("device", "host", "staged")
"""Places of pages that decode rows read."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the dtypes in `flexgen_helm.attention.decode_kernel`."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """The C chunks of keys that queries of a decode row visit, in order of position, and their V visits.

    Attributes:
        places: ``[C, 4]``: the place of each page, by its number in `PLACES`.
        pages: ``[C, 4]``: the page's number at its place.
        begins: ``[C + 1]``: the first visit of each chunk.
        rows: ``[V]``: the row position of each visit's query.
        visible: ``[V]``: keys of the chunk up to the query's own.
        masks: bool ``[V, 128]``: the keys that the mask shows; ``[0, 128]`` if it is plain causality.
    """

    places: Array
    pages: Array
    begins: Array
    rows: Array
    visible: Array
    masks: Array

    @classmethod
    def of(cls, pages: RowPages, rule: MaskRule, visits: list[Visit]) -> DecodePlan:
        """Plan some visits of a decode row. A chunk that several queries share is met once.

        Args:
            pages: The row and its pages.
            rule: Mask of the layers that will use this plan.
            visits: All visits of some queries.
        """
        visits = sorted(visits, key=_chunk_key)
        masks = np.empty((0, CHUNK_TOKENS), np.bool_)
        if visits and not rule.causal_only:
            masks = _shown(visits, rule)
            seen = np.any(masks, axis=1)
            visits, masks = [visit for visit, any_key in zip(visits, seen, strict=True) if any_key], masks[seen]
        chunks = [list(group) for _, group in itertools.groupby(visits, key=_chunk_key)]
        found = [[pages.find(page) for page in chunk[0].pages] for chunk in chunks]
        return cls(
            np.array([[PLACES.index(place) for place, _ in chunk] for chunk in found], np.int64).reshape(-1, 4),
            np.array([[number for _, number in chunk] for chunk in found], np.int64).reshape(-1, 4),
            np.array([0, *itertools.accumulate(map(len, chunks))], np.int64),
            np.array([visit.offset for chunk in chunks for visit in chunk], np.int64),
            np.array([_visible(visit) for chunk in chunks for visit in chunk], np.int64),
            masks,
        )

    def addresses(self, stored: Mapping[Place, Tensor], slots: Tensor | None) -> Array:
        """Where the pages of K, or those of V, are in memory: ``[C, 4]``.

        Args:
            stored: The layer's pages of K or of V by place, in host memory.
            slots: ``[staged pages]``: the slot of each page that is staged. None: there are none.
        """
        pages = self.pages
        if slots is not None:
            staged = self.places == PLACES.index("staged")
            pages = np.where(staged, slots.numpy()[np.where(staged, pages, 0)], pages)
        found = [stored.get(place) for place in PLACES]
        begins = np.array([0 if x is None else x.data_ptr() for x in found])
        sizes = np.array([0 if x is None else x[0].nbytes for x in found])
        addresses: Array = begins[self.places] + sizes[self.places] * pages
        return addresses


class DecodeAttention:
    """Computes the attention of decode rows in several threads, among which queries are divided."""

    def __init__(self, num_threads: int | None = None) -> None:
        """Start no thread before the first row.

        Args:
            num_threads: Number of threads. None: as many as torch uses.
        """
        self._num_threads = num_threads or torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="flexgen-helm-decode")

    def plan(self, pages: RowPages, rule: MaskRule) -> list[DecodePlan]:
        """Plan a row's attention, in as many parts as queries are divided into."""
        size = -(-pages.row.size // self._num_threads)
        parts = itertools.groupby(row_visits(pages.row), key=lambda visit: visit.offset // size)
        return [DecodePlan.of(pages, rule, list(visits)) for _, visits in parts]

    def attend(
        self,
        plans: list[DecodePlan],
        q: Tensor,
        stores: Mapping[Place, PageTensors],
        slots: Tensor | None,
        *,
        scale: float,
        softcap: float | None,
    ) -> Merged:
        """Attend with all queries of a row.

        Args:
            plans: The row's plans.
            q: ``[T, H, D]`` in host memory.
            stores: The layer's pages by place, in host memory.
            slots: ``[staged pages]``: the slot of each page that is staged. None: there are none.
            scale: Factor of the scores.
            softcap: See `flexgen_helm.attention.kernels.attend_chunk`.
        """
        # Numba takes most of a second to import, which an engine that only loads does not spend.
        from flexgen_helm.attention.decode_kernel import attend_chunks

        any_store = next(iter(stores.values()))
        k, v = ({place: x.tensors[part] for place, x in stores.items()} for part in (0, 1))
        queries = q.float().contiguous().numpy()
        top = np.full(queries.shape[:2], NEG_INF, np.float32)
        den = np.zeros_like(top)
        total = np.zeros((*top.shape, any_store.format.v.dim), np.float32)

        def attend(plan: DecodePlan) -> None:
            attend_chunks(
                *(queries, plan.addresses(k, slots), plan.addresses(v, slots), KINDS[any_store.k.dtype]),
                *(any_store.format.k.num_heads, plan.begins, plan.rows, plan.visible, plan.masks),
                *(np.float32(scale), np.float32(softcap or 0.0), top, den, total),
            )

        list((self._pool.map if len(plans) > 1 else map)(attend, plans))
        return Merged(torch.from_numpy(top) * math.log(2), torch.from_numpy(den), torch.from_numpy(total))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _chunk_key(visit: Visit) -> tuple[int, tuple[int, ...]]:
    """What visits to the same chunk have in common."""
    return visit.chunk, visit.pages


def _visible(visit: Visit) -> int:
    return min(CHUNK_TOKENS, visit.last - CHUNK_TOKENS * visit.chunk)


def _shown(visits: list[Visit], rule: MaskRule) -> Array:
    """Which keys of its chunk the query of each visit sees: bool ``[visits, 128]``."""
    q = torch.tensor([visit.first for visit in visits])[:, None]
    k = torch.tensor([visit.chunk for visit in visits])[:, None] * CHUNK_TOKENS + torch.arange(CHUNK_TOKENS)
    shown: Array = (rule.allowed(q, k) & (k <= q)).numpy()
    return shown
