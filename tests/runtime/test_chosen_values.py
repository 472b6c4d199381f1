"""Sparse attention with the cache on other tiers: decode rows bring the chosen rows of V only, and answers do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from flexgen_helm import Engine, Job, Policy, Result
from flexgen_helm.attention.row import RowAttention
from flexgen_helm.kv_cache.page_format import CacheKey
from flexgen_helm.kv_cache.pages import StagedPages
from flexgen_helm.kv_cache.working_set import Loaded, WorkingSet
from flexgen_helm.run_stats import RunStats
from tests.jobs import random_tokens
from tests.runtime.test_compressed_cache import branching_jobs
from tests.workbench import OWN_MEMORY, POLICY, Workbench

SERIAL = replace(POLICY, overlap=False, cpu_attention=0.0)
"""One row at a time has pages on the device."""
NUM_KV, DIM, PAGE = 2, 16, 32
"""Of the tiny Llama."""
ROW_BYTES = {"s10": 4 * DIM, "kv4s10": 4 + DIM // 2}
"""A token of V of a head: numbers of 32 bits; or two numbers of 16 bits and codes of 4."""
NUMBER_BYTES = 4
JOBS = [Job(token_ids=random_tokens(i, 150 + 40 * i), max_new_tokens=12, ignore_eos=True) for i in range(3)]


def run(folder: Path, jobs: list[Job], variant: str, policy: Policy, **options: Any) -> tuple[list[Result], RunStats]:
    options = {"device": OWN_MEMORY, "rows": "packed", **options}
    with Engine.from_pretrained(str(folder), compression=variant, policy=policy, **options) as engine:
        return engine.run(jobs), engine.stats


@contextmanager
def in_kernel_calls() -> Iterator[None]:
    """Decode rows attend as on a GPU."""
    made = RowAttention.__init__

    def init(self: RowAttention, *arguments: Any) -> None:
        pages, cache, device, _, host = arguments
        made(self, pages, cache, device, None, host)

    with patch.object(RowAttention, "__init__", init):
        yield


@contextmanager
def whole_values() -> Iterator[None]:
    """V travels with K in decode rows too, as without sparsity."""
    load = WorkingSet.load
    with (
        patch.object(WorkingSet, "load", lambda self, j, staged, values=True: load(self, j, staged)),
        patch.object(WorkingSet, "bring_values", lambda *_: None),
    ):
        yield


@pytest.mark.parametrize(
    ("variant", "cache"),
    [
        ("kv4s10", (0.0, 1.0, 0.0)),
        ("s10", (0.0, 0.0, 1.0)),
        ("kv4s10", (0.2, 0.4, 0.4)),
        pytest.param("s10", (0.0, 1.0, 0.0), marks=pytest.mark.slow),
        pytest.param("kv4s10", (0.0, 0.0, 1.0), marks=pytest.mark.slow),
        pytest.param("s10", (0.2, 0.4, 0.4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_answers_are_those_of_a_cache_on_the_device(
    bench: Workbench, tmp_path: Path, variant: str, cache: tuple[float, float, float]
) -> None:
    jobs = branching_jobs(1)
    expected, resident = run(bench.folder("llama"), jobs, variant, POLICY, device="cpu")
    assert not resident.bytes_saved
    policy = replace(SERIAL, cache=cache, overlap=cache[2] < 1, block_tokens=320, num_gpu_batches=2)
    found, stats = run(bench.folder("llama"), jobs, variant, policy, offload_folder=tmp_path)
    assert found == expected
    with whole_values():
        again, whole = run(bench.folder("llama"), jobs, variant, policy, offload_folder=tmp_path)
    assert again == expected
    assert stats.bytes_saved.keys() == {"host_to_device", *(["disk_read"] if cache[2] else [])}
    for link in ("host_to_device", "disk_read"):
        assert stats.bytes_moved.get(link, 0) + stats.bytes_saved.get(link, 0) == whole.bytes_moved.get(link, 0)


@pytest.mark.parametrize("variant", ["s10", "kv4s10"])
def test_answers_in_kernel_calls(bench: Workbench, variant: str) -> None:
    folder = bench.folder("llama")
    with in_kernel_calls():
        expected, _ = run(folder, JOBS, variant, POLICY, device="cpu")
        found, stats = run(folder, JOBS, variant, replace(SERIAL, cache=(0.0, 1.0, 0.0)))
    assert found == expected
    assert stats.bytes_saved["host_to_device"] > 0


@pytest.mark.parametrize("variant", ["s10", "kv4s10"])
def test_bytes_are_those_of_the_chosen_rows(bench: Workbench, variant: str) -> None:
    chosen: list[int] = []
    asked = WorkingSet.bring_values

    def bring(self: WorkingSet, key: CacheKey, staged: StagedPages, loaded: Loaded, wanted: Tensor | None = None) -> None:
        assert wanted is not None, "no page is shared by two rows that are loaded at once"
        assert wanted.shape == (len(staged.pages), NUM_KV, PAGE)
        chosen.append(int(wanted.sum()))
        before.append(len(staged.reads))
        asked(self, key, staged, loaded, wanted)

    before: list[int] = []
    with patch.object(WorkingSet, "bring_values", bring):
        _, stats = run(bench.folder("llama"), JOBS, variant, replace(SERIAL, cache=(0.0, 1.0, 0.0)))
    page_bytes = NUM_KV * PAGE * ROW_BYTES[variant]
    assert sum(before) * NUM_KV * PAGE > sum(chosen) > 0
    saved = sum(before) * page_bytes - sum(chosen) * (ROW_BYTES[variant] + NUMBER_BYTES)
    assert stats.bytes_saved == {"host_to_device": saved}


def test_a_device_without_memory_of_its_own_saves_blocks_of_the_disk(bench: Workbench, tmp_path: Path) -> None:
    folder, policy = bench.folder("llama"), replace(SERIAL, cache=(0.0, 0.0, 1.0))
    found, stats = run(folder, JOBS, "s10", policy, device="cpu", offload_folder=tmp_path)
    assert found == run(folder, JOBS, "s10", POLICY, device="cpu")[0]
    assert stats.bytes_saved.keys() == {"disk_read"}
    assert stats.bytes_saved["disk_read"] % 4096 == 0


@pytest.mark.parametrize(("variant", "saved"), [("kv4", {}), ("kv4s10-flexgen", {"host_to_device": 0})])
def test_only_sparsity_saves(bench: Workbench, variant: str, saved: dict[str, int]) -> None:
    """FlexGen's own rule brings V whole; that nothing is saved is told."""
    assert run(bench.folder("llama"), JOBS, variant, replace(SERIAL, cache=(0.0, 1.0, 0.0)))[1].bytes_saved == saved


def test_means_are_planned_on_the_device(bench: Workbench) -> None:
    """A head of a page has two numbers of 16 bits and 32 codes for each channel of K, and `ROW_BYTES` for each token of V."""
    policy = replace(SERIAL, cache=(0.0, 1.0, 0.0))
    with Engine.from_pretrained(str(bench.folder("llama")), compression="kv4s10", policy=policy, device=OWN_MEMORY) as engine:
        plan = engine._parts.plan.cache
    mean_share = 4 * DIM / (DIM * (4 + PAGE // 2) + PAGE * ROW_BYTES["kv4s10"])
    assert plan.means_tier == "device"
    assert plan.mean_share == pytest.approx(mean_share)
    slots = plan.rows_at_once / plan.num_layers
    assert plan.taken["device"] == pytest.approx(mean_share * (1 + 0.5 / plan.num_layers) + slots)
