"""The K/V cache of a model: the tensors of every page, per layer and attention call.

Work that generates at most one token needs K and V only inside the layer being computed, since a block is traversed column
by column: its pages are *transient*, and every layer overwrites those of the last one. Kept pages that are stored where
attention cannot read them are *staged*: brought into slots for the rows that touch them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from flexgen_helm.errors import PolicyError
from flexgen_helm.kv_cache.page_format import CacheKey, PageFormat, PageTensors
from flexgen_helm.kv_cache.page_stores import HOST, DiskPages, GrowingPages, HostPages, OffloadedPages
from flexgen_helm.kv_cache.pages import PageMap, PagePool, Place
from flexgen_helm.kv_cache.working_set import WorkingSet
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.types import Tier


class PagedCache:
    """Storage behind the page numbers of a scheduler. Grows with the highest page in use of each tier but a GPU's."""

    def __init__(
        self,
        pool: PagePool | None = None,
        *,
        device: Device = CPU,
        dtype: torch.dtype | None = None,
        offload_folder: Path | None = None,
        meter: Meter | None = None,
    ) -> None:
        """Little is allocated yet.

        Args:
            pool: Says how many pages each tier has; None: a device without bound.
            device: The device that computes attention. Host pages are staged where it has a memory of its own.
            dtype: The dtype in which K and V are stored; None: as they come.
            offload_folder: The folder for the file of pages on disk, which goes at `close`.
            meter: Counts the bytes that are moved and held.

        Raises:
            PolicyError: If there are pages on disk and no folder for them.
            DiskFull: If the folder has no room for them.
        """
        meter = Meter(device.torch_device) if meter is None else meter
        self._dtype, self.meter = dtype, meter
        self.pages = PageMap(None if pool is None else pool.capacities, device.own_memory)
        """Which tier and place each kept page has."""
        self._kept = GrowingPages(None if pool is None else pool.capacities.device, grows=not device.is_gpu)
        self._transient = GrowingPages(None)
        self._host = HostPages(0 if pool is None else pool.capacities.host)
        self.device = device
        """The device that computes attention."""
        stores = {} if pool is None else self._offloaded(pool, offload_folder)
        self._working = WorkingSet(stores, pool.capacities, device, meter) if pool is not None and stores else None
        self._held = (0, 0)
        self.bytes_per_token: dict[CacheKey, int] = {}
        """Bytes of K and V of one token in each attention call, known once a row went through all layers."""

    def _offloaded(self, pool: PagePool, offload_folder: Path | None) -> dict[Tier, OffloadedPages]:
        """The pages of each tier that attention cannot read in place."""
        stores: dict[Tier, OffloadedPages] = {}
        if pool.capacities.host and self.device.own_memory:
            stores["host"] = self._host
        if pool.capacities.disk:
            if offload_folder is None:
                raise PolicyError(
                    "A part of the K/V cache belongs on disk, but no offload_folder was given. Name one, or give cache shares "
                    "without disk."
                )
            stores["disk"] = DiskPages(offload_folder, pool.capacities.disk, page_bytes=pool.page_bytes)
        return stores

    @property
    def working(self) -> WorkingSet:
        """The staged pages."""
        assert self._working is not None, "no tier of this cache is staged"
        return self._working

    def reserve(self, *, kept: int, transient: int, host: int = 0, staged: int = 0) -> None:
        """Make room for so many pages of each kind; tensors follow at their next use.

        Raises:
            DiskFull: Or any other error of an earlier transfer that was not raised yet.
        """
        self._kept.reserve(kept)
        self._transient.reserve(transient)
        self._host.reserve(host)
        if self._working is not None:
            self._working.reserve(staged)

    def cast(self, x: Tensor) -> Tensor:
        """A tensor in the dtype of the cache."""
        return x if self._dtype is None else x.to(self._dtype)

    def tensors(self, key: CacheKey, k: Tensor, v: Tensor, places: Iterable[Place]) -> dict[Place, PageTensors]:
        """The pages of one attention call at some places, for K and V like ``k`` and ``v`` ``[T, num_heads, dim]``."""
        page_format = PageFormat.plain(k, v)
        self.bytes_per_token[key] = page_format.num_bytes_per_token
        if self._working is not None:
            self._working.register(key, page_format)
        found: dict[Place, PageTensors] = {}
        for place in places:
            if place == "transient":
                found[place] = self._transient.tensors(CacheKey(-1, key.call), page_format, k.device)
            elif place == "staged":
                found[place] = self.working.tensors(key, page_format)
            elif place == "device":
                found[place] = self._kept.tensors(key, page_format, k.device)
            else:
                found[place] = self._host.tensors(key, page_format, HOST)
        self._measure()
        return found

    def _measure(self) -> None:
        held = self._kept.num_bytes + self._transient.num_bytes, self._host.num_bytes
        if held != self._held:
            self._held = held
            self.meter.hold("device", "cache", held[0])
            self.meter.hold("host", "cache", held[1])

    def close(self) -> None:
        """Stop transfers and remove the file on disk."""
        if self._working is not None:
            self._working.close()
