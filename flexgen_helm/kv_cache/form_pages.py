"""Storage of the pages of one form: kept ones on every tier, transient ones, and slots for the staged ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from flexgen_helm.errors import PolicyError
from flexgen_helm.kv_cache.page_format import CacheKey, PageFormat, PageTensors
from flexgen_helm.kv_cache.page_means import PageMeans
from flexgen_helm.kv_cache.page_stores import HOST, DiskPages, GrowingPages, HostPages, OffloadedPages
from flexgen_helm.kv_cache.pages import Form, PageCounts, PageMap, PagePool, PageStorage, Place
from flexgen_helm.kv_cache.working_set import WorkingSet
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.link import Link
from flexgen_helm.memory.meter import Meter
from flexgen_helm.types import Tier


class FormPages:
    """Pages of one form. Their storage grows with the highest page in use of each tier but a GPU's."""

    def __init__(
        self, form: Form, pool: PagePool | None, *, device: Device, offload_folder: Path | None, link: Link | None, meter: Meter
    ) -> None:
        """Allocate little.

        Args:
            form: Their form.
            pool: See `flexgen_helm.kv_cache.paged_cache.PagedCache`; the same for the others.
            device: The device that computes attention.
            offload_folder: The folder for the file of pages on disk.
            link: Moves staged pages; None: there are none.
            meter: Counts the bytes that are moved and held.

        Raises:
            PolicyError: If there are pages on disk and no folder for them.
            DiskFull: If the folder has no room for them.
        """
        self._arena = "cache" if form == "exact" else f"{form} cache"
        self._device, self._meter = device, meter
        self._pool = pool
        self.page_map = PageMap(None if pool is None else pool.capacities, device.own_memory)
        """Which tier and place each page has."""
        self._kept = GrowingPages(None if pool is None else pool.capacities.device, grows=not device.is_gpu)
        self._transient = GrowingPages(None)
        self.means = PageMeans(pool, self.page_map, grows=not device.is_gpu)
        """Means of V, if the form has any."""
        self._host = HostPages(0 if pool is None else pool.capacities.host)
        stores = {} if pool is None else self._offloaded(pool, offload_folder)
        self._working: WorkingSet | None = None
        if pool is not None and stores and link is not None:
            self._working = WorkingSet(stores, pool.capacities, device, link, meter, arena=f"{self._arena} slots")
        self.are_means_on_host = False
        """Whether the CPU reads the means, beside a device with a memory of its own."""
        self._held = (0, 0, 0)

    def _offloaded(self, pool: PagePool, offload_folder: Path | None) -> dict[Tier, OffloadedPages]:
        """The pages of each tier that attention cannot read in place."""
        stores: dict[Tier, OffloadedPages] = {}
        if pool.capacities.host and self._device.own_memory:
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

    def reserve(self, storage: PageStorage, staged: int) -> None:
        """Make room for so many pages; tensors follow at their next use.

        Args:
            storage: Kept and transient pages.
            staged: Slots of staged pages.

        Raises:
            DiskFull: Or any other error of an earlier transfer that was not raised yet.
        """
        if self._working is not None:
            self._working.reserve(staged)  # first, for it waits for transfers that use the stores
        limits = PageCounts(0) if self._pool is None else self._pool.limits
        self._kept.reserve(storage.kept.device, None if self._pool is None else limits.device)
        self._transient.reserve(storage.transient)
        self.means.reserve(storage)
        self._host.reserve(storage.kept.host, limits.host)

    def tensors(
        self, key: CacheKey, page_format: PageFormat, places: Iterable[Place], device: torch.device
    ) -> dict[Place, PageTensors]:
        """The pages of one attention call at some places; those of the device are on ``device``."""
        if self._working is not None:
            self._working.register(key, page_format)
        found: dict[Place, PageTensors] = {}
        for place in places:
            if place == "transient":
                found[place] = self._transient.tensors(CacheKey(-1, key.call), page_format, device)
            elif place == "staged":
                found[place] = self.working.tensors(key, page_format)
            elif place == "device":
                found[place] = self._kept.tensors(key, page_format, device)
            else:
                found[place] = self._host.tensors(key, page_format, HOST)
            if page_format.mean is not None:
                means = self.means.tensor(key, page_format.mean, place, HOST if self.are_means_on_host else device)
                found[place] = replace(found[place], mean=means)
        self._measure()
        return found

    def close(self) -> None:
        """Remove the file on disk."""
        if self._working is not None:
            self._working.close()

    def _measure(self) -> None:
        held = self._kept.num_bytes + self._transient.num_bytes, self._host.num_bytes, self.means.num_bytes
        if held != self._held:
            self._held = held
            self._meter.hold("device", self._arena, held[0])
            self._meter.hold("host", self._arena, held[1])
            self._meter.hold("host" if self.are_means_on_host else "device", f"{self._arena} means", held[2])
