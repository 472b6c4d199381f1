"""What a row writes: its own tokens, tokens copied where sequences part inside a page, and the sealed form of full pages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flexgen_helm.attention.calls import Index, as_index
from flexgen_helm.attention.locate import Locate
from flexgen_helm.attention.row_pages import PLACES, RowPages, counted, exact_table, located, sealed_now
from flexgen_helm.kv_cache.page_format import PageTensors, PartFormat, TokenPlaces
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, Form, Place
from flexgen_helm.memory.copies import to_device
from flexgen_helm.schedule.rows import Segment

HOST = torch.device("cpu")
Stores = Mapping[Form, Mapping[Place, PageTensors]]
"""Pages of a layer by form and place."""
_Spot = tuple[Place, int, int]
"""A stored token: its place, the number of its page there, and its place in the page."""


class Writes:
    """Plan of a row's writes, for all layers."""

    def __init__(self, pages: RowPages, device: torch.device) -> None:
        """Plan.

        Args:
            pages: The row and its pages.
            device: The device that computes the row.
        """
        self._pages, self._device = pages, device
        self._new = list(self._written())
        self._copies: dict[_Spot, _Spot] = {}
        for segment in pages.row.segments:
            self._copy(segment)
        copies: dict[tuple[Place, Place], list[tuple[int, int, int, int]]] = defaultdict(list)
        for target, source in self._copies.items():
            copies[source[0], target[0]].append((*source[1:], *target[1:]))
        self._moves = [
            (pair, self._columns(pair[0], [y[:2] for y in x]), self._columns(pair[1], [y[2:] for y in x]))
            for pair, x in copies.items()
        ]
        full: dict[tuple[Place, Place], list[tuple[int, int]]] = defaultdict(list)
        for segment in pages.row.segments:
            for exact, sealed in sealed_now(segment):
                (source_place, page), (target_place, number) = pages.find(exact, "exact"), pages.find(sealed, "sealed")
                full[source_place, target_place].append((page, number))
        self._full = [
            (pair, self._columns(pair[0], [y[:1] for y in x])[0], self._columns(pair[1], [y[1:] for y in x])[0])
            for pair, x in full.items()
        ]

    def apply(self, stores: Stores, locate: Locate, new: tuple[Tensor, Tensor]) -> None:
        """Write a layer's new K and V ``[T, H_kv, D]``, copy what parting sequences share of a page, and seal full pages."""
        exact = stores["exact"]
        for place, rows, (pages, tokens) in self._new:
            pages = locate.pages("exact", place, pages)
            for (part, stored), x in zip(exact[place].writable_parts, new, strict=True):
                part.write(stored, pages, tokens, x[rows])
        for (source_place, target_place), (source_pages, source_tokens), (pages, tokens) in self._moves:
            source_pages = locate.pages("exact", source_place, source_pages)
            pages = locate.pages("exact", target_place, pages)
            both = zip(exact[source_place].writable_parts, exact[target_place].writable_parts, strict=True)
            for (part, source), (_, target) in both:
                part.copy(TokenPlaces(source, source_pages, source_tokens), TokenPlaces(target, pages, tokens))
        for (source_place, target_place), source_pages, numbers in self._full:
            source_pages = locate.pages("exact", source_place, source_pages)
            pages = locate.pages("sealed", target_place, numbers)
            targets = stores["sealed"][target_place]
            for (plain, source), (sealed, target) in zip(exact[source_place].parts, targets.sealable_parts, strict=True):
                sealed.seal(target, pages, _whole(plain, source, source_pages))
            if targets.format.mean is not None and targets.mean is not None and locate.means is not None:
                # Of the values as attention reads them.
                values = _whole(targets.format.v, targets.v, pages)
                targets.format.mean.store(targets.mean, locate.means(target_place, numbers), values)

    def _written(self) -> Iterator[tuple[Place, Index, Tensor]]:
        """For each place the row positions of the tokens that go there, and their pages and places in these, ``[2, n]``."""
        segments = self._pages.row.segments
        starts, ends = (np.array([getattr(x, name) for x in segments], np.int64) for name in ("start", "end"))
        first = starts // PAGE_TOKENS
        num_pages = (ends - 1) // PAGE_TOKENS - first + 1
        touched = [page for segment, i in zip(segments, first.tolist(), strict=True) for page in exact_table(segment, i)]
        places, pages = located(list(self._pages.spots(touched, "exact")), PLACES)
        owner = np.repeat(np.arange(len(segments)), ends - starts)
        positions = starts[owner] + counted(ends - starts)
        which = (np.cumsum(num_pages) - num_pages - first)[owner] + positions // PAGE_TOKENS
        for place in dict.fromkeys(places.tolist()):
            rows = np.flatnonzero(places[which] == place)
            spots = np.stack([pages[which[rows]], positions[rows] % PAGE_TOKENS])
            device = HOST if PLACES[place] == "host" else self._device
            yield PLACES[place], as_index(rows, self._device), to_device(torch.from_numpy(spots), device)

    def _copy(self, segment: Segment) -> None:
        if segment.copy is not None:
            source, target, count = segment.copy
            for i in range(count):
                spot = self._spot(source, i)
                # A page copied in this very row is not filled yet: copy from where the token itself is.
                self._copies[self._spot(target, i)] = self._copies.get(spot, spot)

    def _spot(self, page: int, token: int) -> _Spot:
        return *self._pages.find(page, "exact"), token

    def _columns(self, place: Place, rows: Sequence[Sequence[int]]) -> Tensor:
        return to_device(torch.tensor(rows).T.contiguous(), HOST if place == "host" else self._device)


def _whole(part: PartFormat, stored: Tensor, pages: Tensor) -> Tensor:
    """Whole pages ``[n, num_heads, 32, dim]``, as attention reads them."""
    heads = torch.arange(part.num_heads, device=pages.device)
    rows = (pages[:, None] * part.num_heads + heads).flatten()
    return part.gather(stored, rows).view(-1, part.num_heads, PAGE_TOKENS, part.dim)
