"""Slabs that are coded without loss: answers, numerics and errors are those of plain slabs, and the disk holds less."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen_helm import Engine, Policy
from flexgen_helm.errors import CorruptFile, DiskFull, PolicyError
from flexgen_helm.runtime import slab_coding
from flexgen_helm.types import RowNumerics
from tests.jobs import fixed_mix
from tests.workbench import OWN_MEMORY, POLICY, Workbench

JOBS = fixed_mix(31, 8)
SIZES: dict[str, Any] = {"gpu_batch_size": POLICY.gpu_batch_size, "gpu_batch_tokens": POLICY.gpu_batch_tokens}
ON_DISK = Policy(**SIZES, weights=(0, 0, 1), slab_coding="lossless")
PLACES: dict[str, tuple[Any, Policy]] = {
    "disk": ("cpu", ON_DISK),
    "disk without overlap": ("cpu", replace(ON_DISK, overlap=False)),
    "half on the disk": ("cpu", replace(ON_DISK, weights=(0.5, 0, 0.5), prefetch=2)),
    "disk behind a link": (OWN_MEMORY, ON_DISK),
    "three tiers": (OWN_MEMORY, replace(ON_DISK, weights=(0.3, 0.3, 0.4))),
}
FAMILIES = {"llama": "packed", "qwen2": "packed", "mixtral": "packed", "mamba2": "single"}
"""A head of its own, one that is tied to the table, a mixture of experts, and a model that needs single rows."""


def load(bench: Workbench, folder: Path, policy: Policy = ON_DISK, *, family: str = "llama", **options: Any) -> Engine:
    arguments = {"dtype": "bfloat16", "device": "cpu", **options}
    return Engine.from_pretrained(str(bench.folder(family)), policy=policy, offload_folder=folder, **arguments)


@pytest.mark.parametrize(
    ("family", "rows"),
    [pytest.param(*each, marks=[pytest.mark.slow] * (each[0] != "llama")) for each in FAMILIES.items()],
)
def test_answers_are_those_of_plain_weights(bench: Workbench, tmp_path: Path, family: str, rows: str) -> None:
    plain = bench.engine(family, dtype="bfloat16")
    expected = plain.run(JOBS)
    for name, (device, policy) in PLACES.items():
        with load(bench, tmp_path, policy, family=family, device=device) as engine:
            assert engine.run(JOBS) == expected, name
            assert engine.numerics == plain.numerics
            assert isinstance(engine.numerics.rows, RowNumerics)
            assert engine.numerics.rows.kind == rows
            assert engine.policy.slab_coding == "lossless"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """Models with more layers than slots."""
    deep = Workbench(tmp_path_factory.mktemp("deep"), num_layers=5)
    yield deep
    deep.close()


@given(
    parts=st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(any),
    prefetch=st.integers(1, 4),
    overlap=st.booleans(),
    device=st.sampled_from(["cpu", OWN_MEMORY]),
)
@settings(derandomize=True, max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_placement_changes_no_bit(
    deep: Workbench, tmp_path: Path, parts: list[int], prefetch: int, overlap: bool, device: Any
) -> None:
    shares = parts[0] / sum(parts), parts[1] / sum(parts), parts[2] / sum(parts)
    policy = replace(ON_DISK, weights=shares, prefetch=prefetch, overlap=overlap)
    with load(deep, tmp_path, policy, device=device) as engine:
        assert engine.run(JOBS) == deep.engine("llama", dtype="bfloat16").run(JOBS)


@pytest.mark.parametrize("device", ["cpu", OWN_MEMORY], ids=["shared memory", "own memory"])
def test_bytes_of_each_tier_are_the_real_ones(bench: Workbench, tmp_path: Path, device: Any) -> None:
    with load(bench, tmp_path, device=device) as engine:
        engine.run(JOBS)
        info, stats = engine.describe(), engine.stats
        slabs = {int(path.stem[-5:]): path.stat().st_size for path in tmp_path.glob("*.slab")}
        shapes = engine._parts.plan.shapes
    assert info.weight_bytes["disk"] == sum(slabs.values()) < sum(shapes.bound_bytes[j] for j in slabs)
    assert info.bits_per_weight_on_disk == 16 * sum(slabs.values()) / sum(shapes.bound_bytes[j] for j in slabs)
    assert info.bits_per_weight == 16
    held = {tier: stats.tier_peak_bytes.get(tier, 0) for tier in ("host", "disk")}
    assert held == {"host": info.planned_bytes["host"], "disk": sum(slabs.values())}
    # At most one cycle of slabs is read ahead: by the load for the first sweep, and by the last sweep for one that never comes.
    # Each of the two may end inside the run or outside of it.
    read, carried = (stats.bytes_moved.get(link, 0) for link in ("disk_read", "host_to_device"))
    assert (stats.sweeps - 1) * sum(slabs.values()) <= read <= (stats.sweeps + 2) * sum(slabs.values())
    if device == OWN_MEMORY:
        assert carried >= stats.sweeps * sum(shapes.bound_bytes[j] for j in slabs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_formats_of_16_bits_are_coded_if_asked(bench: Workbench, tmp_path: Path, dtype: str) -> None:
    with load(bench, tmp_path, dtype=dtype) as engine:
        assert (engine.describe().bits_per_weight_on_disk or 99) < 16
        assert engine.run(JOBS) == bench.engine("llama", dtype=dtype).run(JOBS)


def test_what_cannot_be_coded_is_refused_by_name(bench: Workbench, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"slab_coding is 'lossless', but weights in float32 .* only those in bfloat16"):
        load(bench, tmp_path, dtype="float32")
    with pytest.raises(PolicyError, match=r"slab_coding is 'lossless', but slabs of a compressed variant"):
        load(bench, tmp_path, compression="w4")
    assert not list(tmp_path.iterdir())


def test_codings_do_not_mix(bench: Workbench, tmp_path: Path) -> None:
    plain = replace(ON_DISK, slab_coding="plain")
    for first, second in ((ON_DISK, plain), (plain, ON_DISK)):
        folder = tmp_path / first.slab_coding
        load(bench, folder, first).close()
        with pytest.raises(CorruptFile, match=r"holds slabs of .*coding lossless 1|not of .*coding lossless 1"):
            load(bench, folder, second)
    name, loaded = str(bench.folder("llama")), {}
    for policy in (plain, ON_DISK):
        with Engine.from_pretrained(name, dtype="bfloat16", device="cpu", policy=policy) as engine:
            loaded[policy.slab_coding] = engine._parts.folder
    assert loaded["plain"] != loaded["lossless"]


@pytest.mark.parametrize("coding", ["plain", "lossless"])
def test_automatically_slabs_that_are_there_are_used(
    bench: Workbench, tmp_path: Path, coding: Any, caplog: pytest.LogCaptureFixture
) -> None:
    load(bench, tmp_path, replace(ON_DISK, slab_coding=coding)).close()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with caplog.at_level("INFO"), load(bench, tmp_path, replace(ON_DISK, slab_coding="auto")) as engine:
        assert engine.policy.slab_coding == coding
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    assert sum(f"slabs on disk are {coding}, since {tmp_path} holds such" in text for text in caplog.messages) == 1


@pytest.mark.parametrize(("disk_rate", "coding"), [(1.0, "lossless"), (1e15, "plain")])
def test_automatically_what_a_slow_disk_makes_shorter_is_chosen_and_said(
    bench: Workbench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    disk_rate: float,
    coding: str,
) -> None:
    monkeypatch.setattr(slab_coding, "LEAST_BYTES", 1)
    monkeypatch.setattr(slab_coding, "disk_rates", lambda folder: (disk_rate, disk_rate))
    for name, rate in (("decoding_rate", 1e9), ("product_rate", 1e9)):
        monkeypatch.setattr(slab_coding, name, lambda *_, rate=rate: rate)
    with caplog.at_level("INFO"), load(bench, tmp_path, replace(ON_DISK, slab_coding="auto")) as engine:
        assert engine.policy.slab_coding == coding
    assert sum(f"slabs on disk are {coding}: a sweep takes about" in text for text in caplog.messages) == 1


def test_automatically_few_bytes_and_other_dtypes_are_plain(bench: Workbench, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        with load(bench, tmp_path / dtype, replace(ON_DISK, slab_coding="auto"), dtype=dtype) as engine:
            assert engine.policy.slab_coding == "plain"


def test_how_fast_this_machine_decodes_is_measured() -> None:
    assert 1e7 < slab_coding.decoding_rate(torch.bfloat16) < 1e13


def test_a_damaged_slab_is_named_and_written_again(bench: Workbench, tmp_path: Path) -> None:
    load(bench, tmp_path).close()
    slab = tmp_path / "unit_00001.slab"
    torn = bytearray(slab.read_bytes())
    torn[1000] ^= 1
    slab.write_bytes(torn)
    with load(bench, tmp_path) as engine, pytest.raises(CorruptFile, match=r"unit_00001\.slab is not what was written"):
        engine.run(JOBS)
    slab.unlink()
    with load(bench, tmp_path) as engine:
        assert engine.run(JOBS) == bench.engine("llama", dtype="bfloat16").run(JOBS)


class Killed(BaseException):
    """The process ends here."""


def killed(name: str) -> None:
    raise Killed(name)


def full(name: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("fail", "error"), [(killed, pytest.raises(Killed)), (full, pytest.raises(DiskFull, match="Free some space"))]
)
def test_what_was_written_before_the_end_is_used(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[str], None], error: Any
) -> None:
    replace_file = os.replace

    def replaced(source: str, target: str | Path) -> None:
        if Path(target).name == "unit_00001.slab":
            fail(str(target))
        replace_file(source, target)

    attempt = functools.partial(load, bench, tmp_path)
    with monkeypatch.context() as patch, error:
        patch.setattr(os, "replace", replaced)
        attempt()
    written = (tmp_path / "unit_00000.slab").stat().st_mtime_ns
    with attempt() as engine:
        assert engine.run(JOBS) == bench.engine("llama", dtype="bfloat16").run(JOBS)
    assert (tmp_path / "unit_00000.slab").stat().st_mtime_ns == written
