"""Folders of slabs that are killed, full, damaged, foreign, removed or shared, against the bytes that went in."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgen_helm.errors import CorruptFile, DiskFull, FlexGenError
from flexgen_helm.memory import direct_io
from flexgen_helm.memory.amounts import PAGE
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.slab import SlabLayout, SlabTensor
from flexgen_helm.memory.slab_folder import SlabFolder

IDENTITY = {"weights": "0123456789abcdef", "dtype": "bfloat16"}
NUM_BYTES = {0: PAGE, 3: 33 * PAGE, 4: 5 * PAGE}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them make a slab."""
    monkeypatch.setattr(direct_io, "PIECE", 16 * PAGE)


def layout(num_bytes: int) -> SlabLayout:
    return SlabLayout((SlabTensor(("weight",), torch.uint8, (num_bytes - 7,), 0),), num_bytes)


LAYOUTS = {j: layout(num_bytes) for j, num_bytes in NUM_BYTES.items()}


def slab(j: int) -> Tensor:
    memory = allocate(NUM_BYTES[j] + PAGE)  # longer than the slab, as slots are
    memory[: NUM_BYTES[j]] = torch.randint(0, 256, (NUM_BYTES[j],), generator=torch.Generator().manual_seed(j))
    return memory


@contextmanager
def opened(path: Path, identity: dict[str, str] = IDENTITY) -> Iterator[SlabFolder]:
    folder = SlabFolder(path, identity, LAYOUTS)
    try:
        yield folder
    finally:
        folder.close()


def convert(path: Path) -> None:
    with opened(path) as folder:
        for j in folder.missing():
            folder.write(j, slab(j))


def space_for(folder: SlabFolder) -> int:
    return sum(NUM_BYTES[j] for j in folder.missing())


def read(folder: SlabFolder, j: int) -> bytes:
    into = allocate(NUM_BYTES[j] + PAGE)
    folder.read(j, into).result(timeout=10)
    return into[: NUM_BYTES[j]].numpy().tobytes()


def check(path: Path) -> None:
    """Everything is there and nothing else is."""
    with opened(path) as folder:
        assert folder.missing() == []
        for _ in range(2):
            assert all(read(folder, j) == slab(j)[: NUM_BYTES[j]].numpy().tobytes() for j in LAYOUTS)
    names = {"slabs.json"} | {f"unit_{j:05d}.{kind}" for j in LAYOUTS for kind in ("slab", "json")}
    assert {file.name for file in path.iterdir()} == names


def test_slabs_come_back(tmp_path: Path) -> None:
    with opened(tmp_path / "new" / "folder") as folder:
        assert folder.missing() == [0, 3, 4]
        folder.check_space(space_for(folder))
        folder.write(3, slab(3))
        assert folder.missing() == [0, 4]
        assert read(folder, 3) == slab(3)[: NUM_BYTES[3]].numpy().tobytes()
    convert(tmp_path / "new" / "folder")
    check(tmp_path / "new" / "folder")


def kill_at(moment: int, path: Path) -> bool:
    """Convert in another process, which is killed right before it asks the system to change a file for the n-th time.

    Returns:
        Whether it came to that.
    """
    child = os.fork()
    if child == 0:
        left = iter(range(moment, -1, -1))
        lock = threading.Lock()

        def dying(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                with lock:
                    if next(left) == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return run

        for name in ("mkdir", "open", "pwritev", "fsync", "replace", "link", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            convert(path)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_conversion_killed_at_every_moment(step: int, tmp_path: Path) -> None:
    """What was complete is not written again, and everything is right in the end."""
    moment, seen = 0, set()
    while kill_at(moment, path := tmp_path / str(moment)):
        with opened(path) as folder:
            complete = set(LAYOUTS) - set(folder.missing())
        before = {j: (path / f"unit_{j:05d}.slab").stat() for j in complete}
        convert(path)
        check(path)
        for j, status in before.items():
            now = (path / f"unit_{j:05d}.slab").stat()
            assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
        seen.add(len(complete))
        moment += step
    assert moment > 30
    assert {0, 1, 2} <= seen
    assert step > 1 or 3 in seen


@contextmanager
def size_limit(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_size_limit_while_converting(tmp_path: Path) -> None:
    with size_limit(NUM_BYTES[3] - PAGE), pytest.raises(DiskFull, match=r"cannot be written: .* Free some space"):
        convert(tmp_path)
    assert not list(tmp_path.glob(".slab-*"))
    with opened(tmp_path) as folder:
        assert folder.missing() == [3, 4]
    convert(tmp_path)
    check(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield path
    subprocess.run(["umount", path], check=True)


def test_disk_full_while_converting(small_disk: Path) -> None:
    with opened(small_disk) as folder, pytest.raises(DiskFull, match=r"need [0-9.]+ MiB more in .*, which has .* free"):
        folder.check_space(space_for(folder))
    with pytest.raises(DiskFull, match="cannot be written: No space left on device"):
        convert(small_disk)
    assert not list(small_disk.glob(".slab-*"))
    with opened(small_disk) as folder:
        assert folder.missing() == [3, 4]
        folder.check_space(NUM_BYTES[4])
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    convert(small_disk)
    check(small_disk)


def test_space_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    with opened(tmp_path) as folder, pytest.raises(DiskFull, match=f"need {2**30:.2f} GiB more in {tmp_path}, which has"):
        folder.check_space(2**60)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_flipped_byte(tmp_path: Path) -> None:
    convert(tmp_path)
    path = tmp_path / "unit_00003.slab"
    flip(path, NUM_BYTES[3] - 1)
    with opened(tmp_path) as folder:
        for _ in range(2):
            with pytest.raises(CorruptFile, match=f"{path} is not what was written: .* delete the file and run"):
                read(folder, 3)
        read(folder, 4)
    path.unlink()
    convert(tmp_path)
    check(tmp_path)


def test_checksums_are_verified_once(tmp_path: Path) -> None:
    convert(tmp_path)
    with opened(tmp_path) as folder:
        before = read(folder, 3)
        flip(tmp_path / "unit_00003.slab", 5)
        assert read(folder, 3)[:6] == before[:5] + bytes([before[5] ^ 1])


@pytest.mark.parametrize("size", [0, 7, NUM_BYTES[3] - PAGE])
def test_truncated_slab(tmp_path: Path, size: int) -> None:
    convert(tmp_path)
    with opened(tmp_path) as folder:
        read(folder, 3)
        os.truncate(tmp_path / "unit_00003.slab", size)
        with pytest.raises(CorruptFile, match=r"unit_00003.slab is torn"):
            read(folder, 3)
        assert folder.missing() == [3]
    convert(tmp_path)
    check(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"layout": 1'])
def test_torn_description(tmp_path: Path, content: str) -> None:
    convert(tmp_path)
    (tmp_path / "unit_00004.json").write_text(content)
    with opened(tmp_path) as folder:
        assert folder.missing() == [4]
    convert(tmp_path)
    check(tmp_path)


def test_a_description_in_which_anything_changed_is_none(tmp_path: Path) -> None:
    convert(tmp_path)
    whole = SlabFolder.described(tmp_path)
    assert sorted(whole) == [0, 3, 4]
    file = tmp_path / "unit_00004.json"
    found = json.loads(file.read_text())
    others: list[Any] = ["x", [], None, {"layout": None}, {"layout": {**found["layout"], "tensors": [None]}}]
    others += [{**found, "layout": {**found["layout"], "num_bytes": 8192}}]
    for other in others:
        file.write_text(json.dumps(other))
        assert sorted(SlabFolder.described(tmp_path)) == [0, 3]
    del found["layout_xxh3_64"]  # as earlier versions wrote it
    file.write_text(json.dumps(found))
    assert SlabFolder.described(tmp_path) == whole


def test_folder_of_other_weights(tmp_path: Path) -> None:
    convert(tmp_path)
    wanted = "holds slabs of weights 0123456789abcdef, dtype bfloat16, not of weights x, dtype bfloat16. Give another offload"
    with pytest.raises(CorruptFile, match=wanted), opened(tmp_path, IDENTITY | {"weights": "x"}):
        pass
    (tmp_path / "slabs.json").write_text("{")
    with pytest.raises(CorruptFile, match="holds slabs of something unknown"), opened(tmp_path):
        pass


def test_folder_of_other_layouts(tmp_path: Path) -> None:
    convert(tmp_path)
    with pytest.raises(CorruptFile, match=r"unit_00003.slab has other tensors than part 3 of the model. Give another"):
        SlabFolder(tmp_path, IDENTITY, {3: layout(7 * PAGE)})
    folder = SlabFolder(tmp_path, IDENTITY, {3: LAYOUTS[3], 5: layout(PAGE)})  # other shares of the same model
    assert folder.missing() == [5]
    folder.close()


def test_folder_removed_while_open(tmp_path: Path) -> None:
    convert(path := tmp_path / "slabs")
    with opened(path) as folder:
        read(folder, 3)
        shutil.rmtree(path)
        for action in (lambda: read(folder, 3), lambda: folder.write(4, slab(4)), lambda: folder.check_space(NUM_BYTES[4])):
            with pytest.raises(CorruptFile, match="is missing: the offload folder was removed"):
                action()


def test_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FlexGenError, match="file cannot be read or written: File exists"):
        SlabFolder(tmp_path / "file", IDENTITY, LAYOUTS)


def at_once(*works: Callable[[], None]) -> list[BaseException]:
    """Run in threads; a lock of a folder is not one of a process, so they are as good as processes."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        barrier.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_several_convert_into_one_folder(tmp_path: Path) -> None:
    for i in range(5):
        assert at_once(*[lambda path=tmp_path / str(i): convert(path)] * 3) == []
        check(tmp_path / str(i))


def test_of_two_models_one_has_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One comes right when another has seen that the folder is nobody's and writes that it takes it."""
    plain = os.fsync

    def interrupted(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", plain)
        with opened(tmp_path, {"weights": "a"}):
            pass
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(CorruptFile, match="holds slabs of weights a, not of weights b"), opened(tmp_path, {"weights": "b"}):
        pass
    with opened(tmp_path, {"weights": "a"}):
        pass


def test_what_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path):
        half = tmp_path / ".slab-half"
        half.write_bytes(b"x")
        with opened(tmp_path):
            assert half.exists()
    with opened(tmp_path):
        assert not half.exists()
