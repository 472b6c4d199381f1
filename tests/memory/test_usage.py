"""Free memory under memory cgroups of both versions, on trees of files as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.usage import PeakBytes, free_bytes, total_bytes, used_bytes
from flexgen_helm.run_stats import RunStats
from tests.memory.alone import alone

CPU = torch.device("cpu")
GIB = 2**30
UNLIMITED = 9223372036854771712
"""What version 1 says where there is no limit."""
ONE = "12:cpu,cpuacct:/a\n5:memory:{}\n1:name=systemd:/a\n"
"""/proc/self/cgroup of version 1: a line for each mounted hierarchy."""


def machine(root: Path, *, available: int, cgroup: str | None) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: {64 * 2**20} kB\nMemAvailable:    {available // 1024} kB\nHugePages_Total: 0\n"
    )
    if cgroup is not None:
        (root / "proc/self/cgroup").write_text(cgroup)
    return root


def group_1(folder: Path, limit: int, used: int, *, inactive: int = 0, active: int = 0, mapped: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"cache 1\ninactive_file 1\nactive_file 1\nmapped_file 1\ntotal_cache 2\n"
        f"total_inactive_file {inactive}\ntotal_active_file {active}\ntotal_mapped_file {mapped}\n"
    )


def group_2(folder: Path, limit: int | str, used: int, *, inactive: int = 0, active: int = 0, mapped: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nfile_mapped {mapped}\ninactive_file {inactive}\nactive_file {active}\n")


@pytest.mark.parametrize("cgroup", [None, "0::/\n", ONE.format("/gone")])
def test_without_limits_it_is_what_the_kernel_calls_available(tmp_path: Path, cgroup: str | None) -> None:
    root = machine(tmp_path, available=7 * GIB, cgroup=cgroup)
    assert free_bytes(CPU, root) == 7 * GIB
    assert total_bytes(CPU, root) == 64 * GIB


def test_version_1_counts_every_ancestor_and_what_can_be_reclaimed(tmp_path: Path) -> None:
    root = machine(tmp_path, available=30 * GIB, cgroup=ONE.format("/jobs/run"))
    mount = root / "sys/fs/cgroup/memory"
    group_1(mount, UNLIMITED, 40 * GIB)
    group_1(mount / "jobs", UNLIMITED, 5 * GIB)
    group_1(mount / "jobs/run", 2 * GIB, GIB, inactive=GIB // 4)
    assert free_bytes(CPU, root) == GIB + GIB // 4
    group_1(mount / "jobs/run", 2 * GIB, GIB, inactive=GIB // 4, active=GIB // 2, mapped=GIB // 4)
    assert free_bytes(CPU, root) == GIB + GIB // 2
    group_1(mount / "jobs", 6 * GIB, 5 * GIB + GIB // 2)
    assert free_bytes(CPU, root) == GIB // 2
    group_1(mount / "jobs", 6 * GIB, 6 * GIB + 4096)
    assert free_bytes(CPU, root) == 0


def test_version_2_counts_every_ancestor_and_what_can_be_reclaimed(tmp_path: Path) -> None:
    root = machine(tmp_path, available=30 * GIB, cgroup="0::/jobs/run\n")
    mount = root / "sys/fs/cgroup"
    mount.mkdir(parents=True)
    group_2(mount / "jobs", 4 * GIB, 3 * GIB, inactive=GIB)
    group_2(mount / "jobs/run", "max", 2 * GIB)
    assert free_bytes(CPU, root) == 2 * GIB
    group_2(mount / "jobs", 4 * GIB, 3 * GIB, inactive=GIB // 8, active=GIB // 2, mapped=GIB)
    assert free_bytes(CPU, root) == GIB + GIB // 8
    group_2(mount / "jobs", 4 * GIB, 2 * GIB)
    group_2(mount / "jobs/run", 2 * GIB, GIB)
    assert free_bytes(CPU, root) == GIB
    assert total_bytes(CPU, root) == 2 * GIB


def test_a_container_sees_its_limit_at_the_mount(tmp_path: Path) -> None:
    """/proc shows the path outside of the container, and the container's own group is mounted as the root."""
    root = machine(tmp_path, available=30 * GIB, cgroup=ONE.format("/docker/0123abc"))
    group_1(root / "sys/fs/cgroup/memory", 3 * GIB, GIB)
    assert free_bytes(CPU, root) == 2 * GIB


def test_what_torch_holds_of_a_gpu_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:1")
    found = {"mem_get_info": (3 * GIB, 16 * GIB), "memory_reserved": 12 * GIB, "memory_allocated": 2 * GIB}
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, {gpu: value}.__getitem__)
    assert free_bytes(gpu) == (3 + 12 - 2) * GIB
    assert total_bytes(gpu) == 16 * GIB


def test_this_machine() -> None:
    assert 2**20 < free_bytes(CPU) < 2**50
    assert 2**20 < used_bytes(CPU) < 2**40


@alone
def test_a_peak_is_what_the_kernel_saw_or_else_what_was_sampled() -> None:
    for count, sampled in ((2**28, False), (2**26, True)):  # the second run holds less than the process held before
        peak = PeakBytes(CPU)
        ballast = torch.ones(count, dtype=torch.uint8)
        if sampled:
            peak.sample()
        del ballast
        assert 0.9 * count < peak.bytes() - peak.begun < 1.5 * count


@alone
def test_a_run_samples_its_memory_at_the_end_of_every_sweep() -> None:
    meter, stats = Meter(CPU), RunStats()
    meter.begin_run()
    ballast = torch.ones(2**26, dtype=torch.uint8)
    meter.end_sweep(0, 0, 0)
    meter.end_run(stats)
    assert 0.9 * ballast.nbytes < stats.peak_bytes - stats.idle_bytes < 1.5 * ballast.nbytes
