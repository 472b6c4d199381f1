"""The K/V cache of a model: the tensors of every page, per form, layer and attention call.

Work that generates at most one token needs K and V only inside the layer being computed, since a block is traversed column
by column: its pages are *transient*, and every layer overwrites those of the last one. Kept pages that are stored where
attention cannot read them are *staged*: brought into slots for the rows that touch them.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

import torch
from torch import Tensor

from flexgen_helm.kv_cache.cache_format import PLAIN_CACHE, CacheFormat
from flexgen_helm.kv_cache.form_pages import FormPages
from flexgen_helm.kv_cache.page_format import CacheKey, PageTensors
from flexgen_helm.kv_cache.page_means import PageMeans
from flexgen_helm.kv_cache.pages import Form, PageMap, PagePool, PageStorage, Place
from flexgen_helm.kv_cache.working_set import WorkingSet
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.link import Link
from flexgen_helm.memory.meter import Meter
from flexgen_helm.types import Resource

SPARSE_LINKS: tuple[Resource, ...] = ("host_to_device", "disk_read")
"""Links on which sparse attention saves bytes, if anything comes over them."""
NOTHING = PageStorage()
"""The storage of a sweep without pages."""


class PagedCache:
    """Storage behind the page numbers of a scheduler."""

    def __init__(
        self,
        pools: Mapping[Form, PagePool] | None = None,
        *,
        cache_format: CacheFormat = PLAIN_CACHE,
        device: Device = CPU,
        dtype: torch.dtype | None = None,
        offload_folder: Path | None = None,
        meter: Meter | None = None,
    ) -> None:
        """Allocate little.

        Args:
            pools: Say how many pages of each form each tier has; None: a device without bound.
            cache_format: How K and V are stored.
            device: The device that computes attention. Host pages are staged where it has a memory of its own.
            dtype: The dtype in which exact K and V are stored; None: as they come.
            offload_folder: The folder for the files of pages on disk, which go at `close`.
            meter: Counts the bytes that are moved and held.

        Raises:
            PolicyError: If there are pages on disk and no folder for them.
            DiskFull: If the folder has no room for them.
        """
        self._dtype, self.format = dtype, cache_format
        """How K and V are stored, and what is read of them."""
        self.meter = Meter(device.torch_device) if meter is None else meter
        self.device = device
        """The device that computes attention."""
        staged = any(pool.capacities.is_staged(device.own_memory) for pool in (pools or {}).values())
        self._link = Link(device.torch_device, "cache") if staged else None
        forms: tuple[Form, ...] = ("exact", "sealed") if self.format.seals else ("exact",)
        self._forms = {
            form: FormPages(
                form,
                None if pools is None else pools[form],
                device=device,
                offload_folder=offload_folder,
                link=self._link,
                meter=self.meter,
            )
            for form in forms
        }
        self.page_maps: dict[Form, PageMap] = {form: pages.page_map for form, pages in self._forms.items()}
        """Which tier and place each kept page has, by form."""
        self.bytes_per_token: dict[CacheKey, int] = {}
        """Bytes of exact K and V of one token in each attention call, known once a row went through all layers."""

    def working(self, form: Form) -> WorkingSet:
        """The staged pages of a form."""
        return self._forms[form].working

    @property
    def means(self) -> PageMeans | None:
        """The means of V of sealed pages, which sparse attention reads; None: it is not sparse."""
        return self._forms["sealed"].means if self.format.seals and self.format.sparsity is not None else None

    def keep_means_on_host(self) -> None:
        """Keep means where the CPU reads them, beside a device with a memory of its own; prompts then bring what they read."""
        for pages in self._forms.values():
            pages.are_means_on_host = True

    def reserve(self, pages: Mapping[Form, PageStorage], staged: Mapping[Form, int] | None = None) -> None:
        """Make room for so many pages of each form; tensors follow at their next use.

        Args:
            pages: Kept and transient pages.
            staged: Slots of staged pages. None: there are none.

        Raises:
            DiskFull: Or any other error of an earlier transfer that was not raised yet.
        """
        if self.format.sparsity is not None and any((staged or {}).values()):
            for link in SPARSE_LINKS:
                self.meter.save(link, 0)  # so that nothing saved is told too
        for form, storage in self._forms.items():
            storage.reserve(pages.get(form, NOTHING), (staged or {}).get(form, 0))

    def cast(self, x: Tensor) -> Tensor:
        """A tensor in the dtype of the cache."""
        return x if self._dtype is None else x.to(self._dtype)

    def tensors(
        self, key: CacheKey, k: Tensor, v: Tensor, places: Mapping[Form, Set[Place]]
    ) -> dict[Form, dict[Place, PageTensors]]:
        """The pages of one attention call at some places, for K and V like ``k`` and ``v`` ``[T, num_heads, dim]``."""
        formats = self.format.forms(k, v)
        self.bytes_per_token[key] = formats["exact"].num_bytes_per_token
        return {form: self._forms[form].tensors(key, formats[form], found, k.device) for form, found in places.items()}

    def close(self) -> None:
        """Stop transfers and remove the files on disk."""
        if self._link is not None:
            self._link.close()
        for pages in self._forms.values():
            pages.close()
