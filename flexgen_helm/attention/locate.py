"""Where the pages of a row are in the tensors of a layer, and where the means of V are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.kv_cache.page_means import PageMeans
from flexgen_helm.kv_cache.pages import Form, Place
from flexgen_helm.memory.copies import upload

Array = np.ndarray[Any, Any]


class MeanNumbers:
    """Turns numbers of sealed pages at a place into those of their means of V."""

    def __init__(self, pages: RowPages, means: PageMeans, device: torch.device) -> None:
        """Find the means of the row's staged pages.

        Args:
            pages: The row and its pages.
            means: The means of all sealed pages.
            device: Where they are.
        """
        self._means = means
        staged = means.numbers(pages.staged["sealed"].pages)
        self._staged_on_host = np.array(staged, dtype=np.int64)
        self._staged = upload(staged, device)

    def __call__(self, place: Place, numbers: Tensor) -> Tensor:
        """Return the numbers of the means of pages ``[n]``."""
        if place == "staged":
            return self._staged[numbers]
        first = self._means.first(place)
        return numbers + first if first else numbers

    def of_places(self, places: Array, pages: Array, names: Sequence[Place]) -> Array:
        """Do the same for pages at several places.

        Args:
            places: Number of each page's place in ``names``.
            pages: Number of each page at its place.
            names: Places.
        """
        firsts = np.array([self._means.first(place) for place in names])
        numbers: Array = pages + firsts[places]
        if len(self._staged_on_host):
            staged = places == names.index("staged")
            numbers = np.where(staged, self._staged_on_host[np.where(staged, pages, 0)], numbers)
        return numbers


@dataclass(frozen=True)
class Locate:
    """Turns numbers of pages at a place into their indices in the tensors of a layer.

    Attributes:
        slots: The slots of staged pages, by form.
        means: Numbers of the means of V. None: there are none.
    """

    slots: Mapping[Form, Tensor]
    means: MeanNumbers | None = None

    def pages(self, form: Form, place: Place, numbers: Tensor) -> Tensor:
        """Indices ``[n]`` of pages in the place's tensors: for staged pages, their slots."""
        return self.slots[form][numbers] if place == "staged" else numbers
