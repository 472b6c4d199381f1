"""Attention of decode rows on the CPU: one pass over the pages, without copies of K and V."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from flexgen_helm.attention.kernels import NEG_INF, Merged
from flexgen_helm.attention.locate import MeanNumbers
from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.row_pages import Array, RowPages, located
from flexgen_helm.attention.visits import Visit, row_visits
from flexgen_helm.kv_cache.page_format import MeanPart, PageFormat, PageTensors, PartFormat, PartName
from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS, Form, Place
from flexgen_helm.kv_cache.sealed_format import PerChannelPart, PerTokenPart

PLACES: tuple[Place, ...] = ("device", "host", "staged")
"""Places of pages that decode rows read."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the dtypes in `flexgen_helm.attention.decode_kernel`."""
CODES = 8
"""Codes of b bits have the number 8 + b there."""
Part = TypeVar("Part")
Result = TypeVar("Result")


class LocatedPart(NamedTuple):
    """K, V or means of C chunks in memory.

    Attributes:
        addresses: ``[C, 4]``: where each page begins.
        kinds: ``[C]``: what the bits of the chunk mean, as a number in `KINDS` or of codes.
        head_bytes: ``[C]``: bytes of a head of a page.
    """

    addresses: Array
    kinds: Array
    head_bytes: Array


@dataclass(frozen=True, eq=False)
class LayerPages:
    """A layer's pages of one form, in host memory.

    Attributes:
        stores: The pages by place.
        slots: ``[staged pages]``: the slot of each page that is staged. None: there are none.
        means: Numbers of the means of V. None: means are where their pages are.
    """

    stores: Mapping[Place, PageTensors]
    slots: Tensor | None = None
    means: MeanNumbers | None = None

    @property
    def any_format(self) -> PageFormat:
        """The form of the pages, which is the same at every place."""
        return next(iter(self.stores.values())).format

    @property
    def page_bytes(self) -> int:
        """Bytes of K and V of a page."""
        return next((x.format.num_bytes for x in self.stores.values()), 0)

    def locate(self, places: Array, pages: Array, name: PartName) -> LocatedPart:
        """Find a part of pages in memory.

        Args:
            places: ``[C, 4]``: the place of each page, by its number in `PLACES`.
            pages: ``[C, 4]``: the page's number at its place.
            name: The part.
        """
        if name == "mean" and self.means is not None:
            pages = self.means.of_places(places, pages, PLACES)
        elif self.slots is not None:
            staged = places == PLACES.index("staged")
            pages = np.where(staged, self.slots.numpy()[np.where(staged, pages, 0)], pages)
        found = {place: x.part(name) for place, x in self.stores.items()}
        stored = [found[place][1] if place in found else None for place in PLACES]
        begins = np.array([0 if x is None else x.data_ptr() for x in stored])
        sizes = np.array([0 if x is None else x[0].nbytes for x in stored])
        form, any_stored = next(iter(found.values()))
        return LocatedPart(
            begins[places] + sizes[places] * pages,
            np.full(len(pages), _kind(form, any_stored)),
            np.full(len(pages), form.num_bytes // form.num_heads),
        )


LayerForms = Mapping[Form, LayerPages]
"""A layer's pages by form."""


class Scoring(TypedDict):
    """How products of queries and keys become scores, see `flexgen_helm.attention.kernels.attend_chunk`."""

    scale: float
    softcap: float | None


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """The C chunks of keys that queries of a decode row visit, in order of position, and their V visits.

    Attributes:
        places: ``[C, 4]``: the place of each page, by its number in `PLACES`.
        pages: ``[C, 4]``: the page's number at its place.
        sealed: bool ``[C]``: whether the chunk is read in its sealed form, or in the exact one.
        begins: ``[C + 1]``: the first visit of each chunk.
        rows: ``[V]``: the row position of each visit's query.
        visible: ``[V]``: keys of the chunk up to the query's own.
        masks: bool ``[V, 128]``: the keys that the mask shows; ``[0, 128]`` if it is plain causality.
    """

    places: Array
    pages: Array
    sealed: Array
    begins: Array
    rows: Array
    visible: Array
    masks: Array

    @classmethod
    def of(cls, pages: RowPages, rule: MaskRule, visits: list[Visit]) -> DecodePlan:
        """Plan some visits of a decode row. A chunk that several queries share in the same form is met once.

        Args:
            pages: The row and its pages.
            rule: Mask of the layers that will use this plan.
            visits: All visits of some queries.
        """
        chunks = _by_chunk(visits)
        masks = np.empty((0, CHUNK_TOKENS), np.bool_)
        if visits and not rule.causal_only:
            visits = list(itertools.chain.from_iterable(chunks))
            masks = _shown(visits, rule)
            seen = np.any(masks, axis=1)
            chunks, masks = _by_chunk(list(itertools.compress(visits, seen))), masks[seen]
        spots = [spot for (visit, *_) in chunks for spot in pages.spots(visit.pages, visit.form)]
        places, numbers = (x.reshape(-1, CHUNK_PAGES) for x in located(spots, PLACES))
        return cls(
            places,
            numbers,
            np.array([chunk[0].form == "sealed" for chunk in chunks], np.bool_),
            np.array([0, *itertools.accumulate(map(len, chunks))], np.int64),
            np.array([visit.offset for chunk in chunks for visit in chunk], np.int64),
            np.array([_visible(visit) for chunk in chunks for visit in chunk], np.int64),
            masks,
        )

    def locate(self, forms: LayerForms, name: PartName) -> LocatedPart:
        """Find a part of the plan's pages in memory.

        Args:
            forms: The layer's pages by form.
            name: The part; means only where all chunks are sealed.
        """
        if not self.sealed.any():
            return forms["exact"].locate(self.places, self.pages, name)
        found = LocatedPart(np.empty_like(self.pages), *np.empty((2, len(self.pages)), np.int64))
        of_form: dict[Form, Array] = {"exact": ~self.sealed, "sealed": self.sealed}
        for form, chosen in of_form.items():
            if chosen.any():
                located = forms[form].locate(self.places[chosen], self.pages[chosen], name)
                for target, source in zip(found, located, strict=True):
                    target[chosen] = source
        return found

    def num_bytes(self, forms: LayerForms) -> int:
        """Bytes of K and V that are read."""
        num_sealed = int(self.sealed.sum())
        chunks: dict[Form, int] = {"exact": len(self.sealed) - num_sealed, "sealed": num_sealed}
        return sum(CHUNK_PAGES * chunks[form] * layer.page_bytes for form, layer in forms.items())


class Sums(NamedTuple):
    """Attention of T queries over the chunks so far, in fp32, as the compiled loops keep it.

    Attributes:
        top: ``[T, H]``: the largest score, in units of log2; -inf at first.
        den: ``[T, H]``: the sum of the weights relative to it; 0 at first.
        total: ``[T, H, Dv]``: the weighted sum of the values; 0 at first.
    """

    top: Array
    den: Array
    total: Array

    @classmethod
    def zeros(cls, queries: Array, forms: LayerForms) -> Sums:
        """Begin, with queries ``[T, H, D]``."""
        shape = queries.shape[:2]
        values = *shape, forms["exact"].any_format.v.dim
        return cls(np.full(shape, NEG_INF, np.float32), np.zeros(shape, np.float32), np.zeros(values, np.float32))

    def merged(self) -> Merged:
        """The same, as torch merges chunks."""
        top, den, total = (torch.from_numpy(x) for x in self)
        return Merged(top * math.log(2), den, total)


def add_chunks(plan: DecodePlan, *, queries: Array, forms: LayerForms, sums: Sums, scale: float, softcap: float | None) -> None:
    """Attend to the chunks of a plan, which are behind those that the sums have; see `DecodeAttention.attend`."""
    # Numba takes most of a second to import, which an engine that only loads does not spend.
    from flexgen_helm.attention.decode_kernel import attend_chunks

    k, v = plan.locate(forms, "k"), plan.locate(forms, "v")
    attend_chunks(
        *(queries, k.addresses, v.addresses, *(np.stack(x, 1) for x in zip(k[1:], v[1:], strict=True))),
        *(forms["exact"].any_format.k.num_heads, plan.begins, plan.rows, plan.visible, plan.masks),
        *(np.float32(scale), np.float32(softcap or 0.0), *sums),
    )


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
        return [DecodePlan.of(pages, rule, visits) for visits in self.divided(pages)]

    def divided(self, pages: RowPages) -> list[list[Visit]]:
        """Divide the visits of a row among the threads, query by query."""
        size = -(-pages.row.size // self._num_threads)
        return [list(visits) for _, visits in itertools.groupby(row_visits(pages.row), key=lambda visit: visit.offset // size)]

    def in_threads(self, work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
        """Work on parts of a row side by side."""
        return list((self._pool.map if len(parts) > 1 else map)(work, parts))

    def attend(
        self,
        plans: list[DecodePlan],
        q: Tensor,
        forms: LayerForms,
        *,
        scale: float,
        softcap: float | None,
    ) -> Merged:
        """Attend with all queries of a row.

        Args:
            plans: The row's plans.
            q: ``[T, H, D]`` in host memory.
            forms: The layer's pages by form: the exact ones, and the sealed ones where a plan reads such.
            scale: Factor of the scores.
            softcap: See `flexgen_helm.attention.kernels.attend_chunk`.
        """
        queries = q.float().contiguous().numpy()
        sums = Sums.zeros(queries, forms)
        self.in_threads(partial(add_chunks, queries=queries, forms=forms, sums=sums, scale=scale, softcap=softcap), plans)
        return sums.merged()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _by_chunk(visits: list[Visit]) -> list[list[Visit]]:
    """Visits to the same chunk, in order of position."""
    found: dict[tuple[int, Form, tuple[int, ...]], list[Visit]] = defaultdict(list)
    for visit in visits:
        found[visit.chunk, visit.form, visit.pages].append(visit)
    return [found[key] for key in sorted(found)]


def _kind(part: PartFormat | MeanPart, stored: Tensor) -> int:
    """What the bits of a stored part mean, as a number for the compiled loop."""
    if stored.dtype in KINDS:
        return KINDS[stored.dtype]
    assert isinstance(part, PerChannelPart | PerTokenPart)
    return CODES + part.bits


def _visible(visit: Visit) -> int:
    return min(CHUNK_TOKENS, visit.last - CHUNK_TOKENS * visit.chunk)


def _shown(visits: list[Visit], rule: MaskRule) -> Array:
    """Which keys of its chunk the query of each visit sees: bool ``[visits, 128]``."""
    q = torch.tensor([visit.first for visit in visits])[:, None]
    k = torch.tensor([visit.chunk for visit in visits])[:, None] * CHUNK_TOKENS + torch.arange(CHUNK_TOKENS)
    shown: Array = (rule.allowed(q, k) & (k <= q)).numpy()
    return shown
