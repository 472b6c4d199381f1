"""Rows of V that follow K into the slots: exactly those that are wanted and not there, from any tier, counted as saved."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.kv_cache.cargo import Cargo
from flexgen_helm.kv_cache.page_format import CacheKey, MeanPart, PageFormat, PlainPart
from flexgen_helm.kv_cache.page_stores import DiskPages, HostPages
from flexgen_helm.kv_cache.pages import PageCounts, StagedPages
from flexgen_helm.kv_cache.sealed_format import PerTokenPart
from flexgen_helm.kv_cache.working_set import Loaded, WorkingSet
from flexgen_helm.memory.amounts import padded
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.link import Link
from flexgen_helm.memory.meter import Meter
from flexgen_helm.run_stats import RunStats

CPU = torch.device("cpu")
KEYS = [CacheKey(0, 0), CacheKey(0, 1), CacheKey(1, 0)]
"""A layer that attends twice, and another one."""
ON_HOST, ON_DISK, NUM_SLOTS, HEADS, TOKENS = 5, 5, 10, 2, 32
PLAIN = PlainPart(HEADS, 6, torch.float32)
FORMATS = [
    PageFormat(PLAIN, PlainPart(HEADS, 24, torch.float32), MeanPart(HEADS, 24, torch.float32)),
    PageFormat(PLAIN, PerTokenPart(HEADS, 70, torch.float32, 4), MeanPart(HEADS, 70, torch.float32)),
]
ROW_BYTES = dict(zip(FORMATS, (4 * 24, 2 * 4 + 70 // 2 + 1), strict=True))
"""24 numbers; numbers of two groups, 70 codes of 4 bits, and a byte more, so that they are even. No block is a multiple."""


class Asked(NamedTuple):
    """A row that loads pages."""

    pages: list[int]
    whole: bool
    seed: int
    """Of the choice of rows."""


@dataclass
class Brought:
    """What travels: pages, those whose V comes with K, those from disk, and single rows of V."""

    pages: int = 0
    whole: int = 0
    from_disk: int = 0
    rows: int = 0

    def __add__(self, other: Brought) -> Brought:
        return Brought(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


ROWS = st.lists(
    st.builds(Asked, st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), st.booleans(), st.integers(0, 9)),
    min_size=1,
    max_size=4,
)


class Bench:
    """A working set over pages of random bytes on host and disk."""

    def __init__(self, folder: Path, page_format: PageFormat) -> None:
        self.format, self.meter, device = page_format, Meter(CPU), Device(CPU, own_memory=True)
        host, disk = HostPages(ON_HOST), DiskPages(folder, ON_DISK, page_bytes=1)
        host.reserve(ON_HOST)
        self.link = Link(CPU, "cache")
        counts = PageCounts(0, ON_HOST, ON_DISK)
        self.working = WorkingSet({"host": host, "disk": disk}, counts, device, self.link, self.meter)
        self.working.reserve(NUM_SLOTS)
        self.values: dict[tuple[CacheKey, int], Tensor] = {}
        """Rows of V of each page, uint8 ``[heads, tokens, bytes]``."""
        torch.manual_seed(0)
        for key in KEYS:
            self.working.register(key, page_format)
            for store, first in ((host, 0), (disk, ON_HOST)):
                cargo = Cargo(key, page_format)
                buffer = torch.zeros(5 * store.transfer_bytes(cargo) + 4096, dtype=torch.uint8)
                buffer = buffer[-buffer.data_ptr() % 4096 :]  # direct access wants a page boundary
                k, v = store.view(cargo, buffer, 5)
                k.normal_()
                for i in range(5):
                    v[i] = (
                        torch.randint(0, 127, v[i].shape, dtype=torch.uint8)
                        if v.dtype == torch.uint8
                        else torch.randn(v[i].shape)
                    )
                    self.values[key, first + i] = rows_of(v[i]).clone()
                for future in store.write(cargo, list(range(5)), buffer):
                    future.result()

    def rows(self, key: CacheKey, loaded: Loaded) -> Tensor:
        """What the slots hold of V, ``[pages, heads, tokens, bytes]``."""
        return torch.stack([rows_of(x) for x in self.working.tensors(key, self.format).v[loaded.slots]])

    def attend(self, j: int, rows: list[Asked]) -> Brought:
        """Load rows of layer j together, let one after the other bring what it wants, and release them."""
        pages = [StagedPages(row.pages, frozenset(row.pages), frozenset()) for row in rows]
        loaded = [self.working.load(j, staged, values=row.whole) for row, staged in zip(rows, pages, strict=True)]
        first_of = {page: row for row in reversed(rows) for page in row.pages}
        keys = [key for key in KEYS if key.layer == j]
        num_rows = 0
        for key in keys:
            held = {page: torch.full((HEADS, TOKENS), row.whole) for page, row in first_of.items()}
            for row, staged, each in zip(rows, pages, loaded, strict=True):
                self.working.wait(each)
                chance = torch.Generator().manual_seed(row.seed)
                wanted = torch.rand(len(row.pages), HEADS, TOKENS, generator=chance) < 0.1 * (row.seed % 4)
                if row.whole:
                    wanted[:] = True
                if each.is_partial or not row.whole:
                    self.working.bring_values(key, staged, each, None if row.whole else wanted)
                for page, found, want in zip(row.pages, self.rows(key, each), wanted, strict=True):
                    assert torch.equal(found[want], self.values[key, page][want])
                    num_rows += int((want & ~held[page]).sum())
                    held[page] |= want
        for staged in pages:
            self.working.release(j, staged)
        whole = sum(row.whole for row in first_of.values())
        from_disk = sum(page >= ON_HOST for page in first_of)
        return Brought(len(keys) * len(first_of), len(keys) * whole, len(keys) * from_disk, num_rows)

    def close(self) -> None:
        self.link.close()
        self.working.close()


def rows_of(page: Tensor) -> Tensor:
    """The bytes of a page of V, ``[heads, tokens, bytes]``."""
    return page.contiguous().view(torch.uint8).view(HEADS, TOKENS, -1)


ALIKE = [Asked([0, 1], False, 3)] * 2
"""Rows that choose the same values of pages on the host."""


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.sampled_from(FORMATS), st.booleans())
@example(ALIKE, FORMATS[0], True)
def test_wanted_rows_are_there_and_come_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Asked], page_format: PageFormat, together: bool
) -> None:
    """Rows that are loaded at once share slots; one that reads all of V gets what others left out."""
    bench, stats = Bench(tmp_path_factory.mktemp("pages"), page_format), RunStats()
    bench.meter.begin_run()
    try:
        brought = sum(
            (bench.attend(j, group) for j in (0, 1) for group in ([rows] if together else [[row] for row in rows])), Brought()
        )
        bench.working.reserve(NUM_SLOTS)
        bench.meter.end_sweep(0, 0, 0)
        bench.meter.end_run(stats)
    finally:
        bench.close()
    v_bytes = page_format.v.num_bytes
    moved = brought.pages * page_format.k.num_bytes + brought.whole * v_bytes + brought.rows * (ROW_BYTES[page_format] + 4)
    saved = stats.bytes_saved.get("host_to_device", 0)
    if not brought.from_disk:  # whose pages travel with padding
        assert stats.bytes_moved["host_to_device"] == moved
        assert moved + saved == brought.pages * page_format.num_bytes
    read, unread = stats.bytes_moved.get("disk_read", 0), stats.bytes_saved.get("disk_read", 0)
    assert read + unread == brought.from_disk * sum(padded(part.num_bytes) for part in page_format.parts)
