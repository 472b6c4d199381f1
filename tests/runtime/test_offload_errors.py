"""What goes wrong on the slow tiers: a clear error or a correct resume, never a wrong answer, a hang or lost work."""

from __future__ import annotations

import logging
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.errors import CorruptFile, DiskFull, FlexGenError, JobFailed, PolicyError, UnsupportedModel
from flexgen_helm.rows.packed import PackedRows
from flexgen_helm.schedule.operations import Order
from flexgen_helm.types import Shares
from tests.jobs import fixed_mix, random_tokens
from tests.workbench import OWN_MEMORY, POLICY, Workbench

JOBS = fixed_mix(31, 8)
ON_DISK = Policy(gpu_batch_size=16, gpu_batch_tokens=32, block_tokens=96, weights=(0, 0, 1))


def load(bench: Workbench, offload: Path, policy: Policy = ON_DISK, **arguments: Any) -> Engine:
    arguments = {"device": "cpu", "policy": policy, "offload_folder": offload, **arguments}
    return Engine.from_pretrained(str(bench.folder("llama")), **arguments)


def slabs(offload: Path) -> list[Path]:
    return sorted(offload.glob("*.slab"))


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Files of this process cannot grow further, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_slabs_are_written_once_and_used_again(bench: Workbench, tmp_path: Path) -> None:
    with load(bench, tmp_path) as engine:
        expected = engine.run(JOBS)
    times = {path: path.stat().st_mtime_ns for path in slabs(tmp_path)}
    assert len(times) == 3  # two layers and the output head
    with load(bench, tmp_path) as engine:
        assert engine.run(JOBS) == expected
    assert {path: path.stat().st_mtime_ns for path in slabs(tmp_path)} == times


def test_a_flipped_byte_is_an_error_that_names_the_file(bench: Workbench, tmp_path: Path) -> None:
    load(bench, tmp_path).close()
    torn = slabs(tmp_path)[1]
    content = bytearray(torn.read_bytes())
    content[100] ^= 1
    torn.write_bytes(content)
    with load(bench, tmp_path) as engine, pytest.raises(CorruptFile, match=torn.name):
        engine.run(JOBS)


def test_a_torn_slab_is_written_again(bench: Workbench, tmp_path: Path) -> None:
    load(bench, tmp_path).close()
    torn = slabs(tmp_path)[0]
    torn.write_bytes(torn.read_bytes()[:-4096])
    with load(bench, tmp_path) as engine:
        assert engine.run(JOBS) == bench.engine("llama").run(JOBS)


def test_slabs_of_another_model_are_never_used(bench: Workbench, tmp_path: Path) -> None:
    load(bench, tmp_path).close()
    with pytest.raises(CorruptFile, match="offload_folder"):
        Engine.from_pretrained(str(bench.folder("opt")), device="cpu", policy=ON_DISK, offload_folder=tmp_path)


def test_a_folder_that_is_removed_while_running(bench: Workbench, tmp_path: Path) -> None:
    """An error, not a wrong answer; an engine made anew writes the folder again."""
    folder = tmp_path / "offload"
    expected = bench.engine("llama").run(JOBS)
    with load(bench, folder) as engine:
        shutil.rmtree(folder)
        with pytest.raises(FlexGenError, match=str(folder)):
            engine.run(JOBS)
    with load(bench, folder) as engine:
        assert engine.run(JOBS) == expected


def test_a_full_disk_while_slabs_are_written(bench: Workbench, tmp_path: Path) -> None:
    bench.folder("llama")
    with largest_file(8192), pytest.raises(DiskFull, match=str(tmp_path)):
        load(bench, tmp_path)
    with load(bench, tmp_path) as engine:
        assert engine.run(JOBS) == bench.engine("llama").run(JOBS)


def test_a_full_disk_while_hidden_states_are_written(bench: Workbench, tmp_path: Path) -> None:
    policy = Policy(gpu_batch_size=16, gpu_batch_tokens=32, block_tokens=96, hidden=(0, 0, 1))
    with load(bench, tmp_path, policy) as engine:
        with largest_file(4096), pytest.raises(DiskFull, match=r"hidden states.*hidden=\(1, 0, 0\)"):
            engine.run(JOBS)
        assert engine.run(JOBS) == bench.engine("llama").run(JOBS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_memory": {"device": "10KB", "host": "10KB"}}, r"The least .* 2.0 MiB of memory, but max_memory allows 19.5 KiB"),
        ({"max_memory": {"disk": "10KB"}}, "needs 0.4 MiB of disk space, but max_memory allows 9.8 KiB"),
        ({"max_memory": {"gpu": "1GiB"}}, "device, host, disk"),
        ({"kv_dtype": "int4"}, "kv_dtype is 'int4'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_is_written(
    bench: Workbench, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(FlexGenError, match=message):
        load(bench, tmp_path / "offload", **arguments)
    assert not slabs(tmp_path / "offload")


def test_a_disk_that_is_too_small_is_named(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen_helm.runtime.free_space.free_disk_bytes", lambda folder: 10 * 1024)
    with pytest.raises(
        PolicyError, match=rf"of disk space, but 10.0 KiB are free in {tmp_path / 'offload'}\. .*Free disk space"
    ):
        load(bench, tmp_path / "offload")


def test_with_the_least_memory_that_a_refusal_names_the_model_loads_and_answers(bench: Workbench, tmp_path: Path) -> None:
    policy = Policy(gpu_batch_size=16, gpu_batch_tokens=32)
    with pytest.raises(PolicyError, match="The least") as refused:
        load(bench, tmp_path, policy, max_memory={"host": "100KiB"})
    found = re.search(r"runs in is ([\d.]+) MiB of memory", str(refused.value))
    assert found is not None
    least = float(found[1])
    with pytest.raises(PolicyError, match=f"is {least} MiB of memory, but max_memory allows {least - 0.1:.1f} MiB"):
        load(bench, tmp_path, policy, max_memory={"host": f"{least - 0.1:.1f}MiB"})
    assert not slabs(tmp_path)
    long = Job(token_ids=random_tokens(7, 500), max_new_tokens=12)
    with load(bench, tmp_path, policy, max_memory={"host": f"{least}MiB"}) as engine:
        assert engine.describe().weight_bytes["disk"] > 0
        assert engine.run([long, *JOBS]) == bench.engine("llama").run([long, *JOBS])


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.4, 0.2), (-1, 1, 1), "device", (1, "0", 0)])
@pytest.mark.parametrize("name", ["weights", "cache", "hidden"])
def test_shares_that_make_no_sense_are_refused(bench: Workbench, tmp_path: Path, name: str, shares: Any) -> None:
    with pytest.raises(PolicyError, match=f"{name} must be .*add up to 1"):
        load(bench, tmp_path, Policy(**{name: shares}))


def test_layers_that_share_weights_cannot_be_placed_one_by_one(bench: Workbench, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="share weights with other layers"):
        Engine.from_pretrained(str(bench.folder("zamba2")), device="cpu", policy=ON_DISK, offload_folder=tmp_path)


def test_shares_are_reported_and_peaks_compared_with_limits(
    bench: Workbench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half: Shares = (0.5, 0.0, 0.5)
    policy = Policy(gpu_batch_size=16, gpu_batch_tokens=32, weights=half)
    with caplog.at_level(logging.INFO), load(bench, tmp_path, policy, max_memory={"host": "2GiB"}) as engine:
        engine.run(JOBS)
        assert engine.policy.weights != half
        assert sum(engine.policy.weights or ()) == pytest.approx(1)
        info = engine.describe()
        assert info.weight_bytes["disk"] > 0
        assert engine.stats.tier_peak_bytes["disk"] == info.weight_bytes["disk"]
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert any("on the disk" in record.getMessage() for record in caplog.records)
        engine._parts.plan.space.limits["host"] = 1000  # type: ignore[index]
        engine.run(JOBS)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert re.search(r"more memory was used than allowed: [\d.]+ \wiB of memory, where max_memory allows 1.0 KiB", warnings[0])


def test_layers_too_large_for_the_device_are_checked_on_the_cpu(
    bench: Workbench, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of a 16-bit model needs three times its layers: more than where they are computed one at a time."""
    expected = bench.engine("llama").run(JOBS)
    monkeypatch.setattr("flexgen_helm.policy.working_memory.checking_bytes", lambda *_, **__: 2**60)
    with caplog.at_level(logging.INFO), load(bench, tmp_path, device=OWN_MEMORY) as engine:
        assert engine.run(JOBS) == expected
    assert any("checked on the CPU" in record.getMessage() for record in caplog.records)
    with pytest.raises(PolicyError, match=r"are free.*self-check at load about 1073741824.00 GiB"):
        load(bench, tmp_path)


def test_all_on_the_device_offloads_nothing(bench: Workbench, tmp_path: Path) -> None:
    with load(bench, tmp_path, POLICY) as engine:
        assert engine.run(JOBS) == bench.engine("llama").run(JOBS)
        assert engine.policy.weights == (1.0, 0.0, 0.0)
        assert not engine.stats.bytes_moved
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("order", ["zigzag", "row"])
def test_a_sweep_that_was_given_up_leaves_slots_and_buffers_usable(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Order
) -> None:
    expected = bench.engine("llama").run(JOBS)
    with load(bench, tmp_path, order=order, device=OWN_MEMORY) as engine:
        replay = PackedRows.replay
        for failing in (0, 1):
            with monkeypatch.context() as patch:

                def broken(rows: PackedRows, j: int, recording: Any, failing: int = failing) -> None:
                    if j == failing:
                        raise RuntimeError("given up")
                    replay(rows, j, recording)

                patch.setattr(PackedRows, "replay", broken)
                with pytest.raises(JobFailed, match="given up"):
                    engine.run(JOBS)
            assert engine.run(JOBS) == expected
        engine.close()  # a second time at the end of the block


def test_slabs_that_are_there_need_no_space(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(bench, tmp_path).close()
    monkeypatch.setattr("flexgen_helm.runtime.free_space.free_disk_bytes", lambda folder: 0)
    with load(bench, tmp_path) as engine:
        assert engine.run(JOBS) == bench.engine("llama").run(JOBS)


def test_an_offload_folder_that_cannot_be_made(bench: Workbench, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FlexGenError, match=r"offload_folder .*/file/none cannot be created"):
        load(bench, tmp_path / "file" / "none", Policy(cache=(0, 0, 1)))
