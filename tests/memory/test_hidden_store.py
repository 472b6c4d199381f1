"""Hidden states rest on any tier and come back as they were."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.errors import FlexGenError
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.hidden_store import HiddenStore
from flexgen_helm.memory.meter import Meter
from flexgen_helm.types import Shares

CPU = torch.device("cpu")
SHARES: list[Shares] = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.25, 0.25, 0.5)]


def store(folder: Path, shares: Shares) -> HiddenStore:
    return HiddenStore(shares, device=Device(CPU, own_memory=True), folder=folder, meter=Meter(CPU))


def through(hidden: HiddenStore, rows: list[Tensor]) -> list[Tensor]:
    """What rows are after a layer's end and the next one's begin."""
    for k, row in enumerate(rows):
        hidden.store(k, row)
    for k in range(len(rows)):
        hidden.load(k)
    return [hidden.take(k) for k in range(len(rows))]


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    shares=st.sampled_from(SHARES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rows_of_any_sizes_come_back_sweep_after_sweep(
    tmp_path: Path, lengths: list[int], shares: Shares, dtype: torch.dtype
) -> None:
    hidden = store(tmp_path, shares)
    for sizes in (lengths, lengths[::-1]):
        hidden.begin_sweep(len(sizes))
        rows = [torch.randn(1, size, 24).to(dtype) for size in sizes]
        for _ in range(3):
            found = through(hidden, [row.clone() for row in rows])
            assert all(torch.equal(a, b) for a, b in zip(found, rows, strict=True))
            rows = [row * 2 for row in rows]
    hidden.close()
    assert not list(tmp_path.iterdir())


def open_files(folder: Path) -> list[Path]:
    """Returns the open files of this process in a folder; they may have no name there any more."""
    numbers = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return [number for number in numbers if os.path.realpath(number).startswith(f"{folder.resolve()}/")]


def test_any_number_of_rows_is_one_open_file(tmp_path: Path) -> None:
    hidden = store(tmp_path, (0.0, 0.0, 1.0))
    hidden.begin_sweep(100)
    through(hidden, [torch.ones(1, 1, 2)] * 100)
    (file,) = open_files(tmp_path)
    assert file.stat().st_size == 100 * 2 * 4
    for _ in range(3):  # later sweeps use the same space
        hidden.begin_sweep(100)
        through(hidden, [torch.ones(1, 1, 2)] * 100)
    assert file.stat().st_size == 100 * 2 * 4
    hidden.close()


def test_a_disk_that_cannot_be_read_is_an_error_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = store(tmp_path, (0.0, 0.0, 1.0))
    hidden.begin_sweep(1)
    hidden.store(0, torch.ones(1, 4, 8))

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    hidden.load(0)
    with pytest.raises(FlexGenError, match=f"{tmp_path}.*Input/output error.*Check the disk"):
        hidden.take(0)
    hidden.close()
