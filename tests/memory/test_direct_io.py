"""Reads and writes past the page cache, against plain ones of Python."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexgen_helm.errors import CorruptFile, DiskFull, FlexGenError
from flexgen_helm.memory.amounts import PAGE
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.direct_io import PIECE, DirectFile, DiskIO

SIZE = 2 * PIECE + 3 * PAGE
"""Three pieces, the last of them short."""


@pytest.fixture
def io() -> Iterator[DiskIO]:
    io = DiskIO()
    yield io
    io.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(SIZE))
    return path


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no direct access says so when a file is opened."""
    plain = os.open

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)


def refuse_direct_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that says so only when a file is read or written."""

    def refusing(call: Callable[..., int]) -> Callable[..., int]:
        def run(descriptor: int, *arguments: object) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(descriptor, *arguments)

        return run

    for name in ("preadv", "pwritev"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


def assert_reads_and_writes(io: DiskIO, path: Path) -> None:
    """A whole file comes, and other content goes."""
    file, memory = DirectFile(path, os.O_RDWR), allocate(SIZE)
    io.read(file, 0, memory).result(timeout=10)
    assert memory.numpy().tobytes() == path.read_bytes()
    memory.random_(0, 256)
    io.write(file, 0, memory).result(timeout=10)
    assert memory.numpy().tobytes() == path.read_bytes()
    file.close()


def test_requests_that_are_refused_go_through_the_page_cache(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_direct_requests(monkeypatch)
    caplog.set_level(logging.INFO)
    io = DiskIO()
    for _ in range(2):
        assert_reads_and_writes(io, path)
    assert caplog.text.count("does not support direct I/O") == 1
    io.close()


@pytest.mark.parametrize("direct", [True, False])
def test_ranges_come_and_go_as_they_are(
    io: DiskIO, path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not direct:
        refuse_direct(monkeypatch)
    caplog.set_level(logging.INFO)
    expected = bytearray(path.read_bytes())
    file = DirectFile(path, os.O_RDWR)
    if direct and not file.is_direct:
        pytest.skip("the temporary folder's file system has no direct access")
    assert file.is_direct == direct
    whole, part = allocate(SIZE), allocate(2 * PAGE)
    io.read(file, 0, whole).result()
    assert whole.numpy().tobytes() == expected
    part.random_(0, 256)
    io.write(file, PIECE - PAGE, part).result()
    expected[PIECE - PAGE : PIECE + PAGE] = part.numpy().tobytes()
    io.read(file, PAGE, whole[: SIZE - PAGE]).result()
    assert whole[: SIZE - PAGE].numpy().tobytes() == expected[PAGE:]
    assert path.read_bytes() == expected
    assert caplog.text.count("does not support direct I/O") == (not direct)
    file.close()


@pytest.mark.parametrize("direct", [True, False])
def test_reads_leave_nothing_in_the_page_cache(io: DiskIO, path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fincore` of util-linux says how much is there."""
    if not direct:
        refuse_direct(monkeypatch)
    file = DirectFile(path, os.O_RDWR)
    os.fsync(file.descriptor)
    os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    io.read(file, 0, allocate(SIZE)).result()
    found = subprocess.run(["fincore", "--bytes", "--noheadings", "--output", "RES", path], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("fincore does not work here")
    assert int(found.stdout) == 0
    file.close()


def test_the_system_may_move_less_than_it_was_asked_for(io: DiskIO, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("preadv", "pwritev"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, views, at, call=call: call(fd, [views[0][: 256 * PAGE]], at))
    assert_reads_and_writes(io, path)


def test_a_request_is_done_when_all_its_pieces_and_what_follows_are(io: DiskIO, path: Path) -> None:
    file, into = DirectFile(path), allocate(SIZE)
    seen: list[bytes] = []
    threads: list[str] = []

    def then() -> None:
        seen.append(into.numpy().tobytes())
        threads.append(threading.current_thread().name)

    io.read(file, 0, into, then).result()
    assert seen == [path.read_bytes()]
    assert threads[0].startswith("flexgen-helm-disk")
    with pytest.raises(ZeroDivisionError):
        io.read(file, 0, into, lambda: print(1 / 0)).result()
    assert not io.read(file, 0, into).cancel()
    io.close()
    file.close()


@pytest.mark.parametrize("size", [PIECE + 2 * PAGE, PIECE + 2 * PAGE + 7, 0])
@pytest.mark.parametrize("direct", [True, False])
def test_torn_file(io: DiskIO, path: Path, size: int, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not direct:
        refuse_direct(monkeypatch)
    os.truncate(path, size)
    file = DirectFile(path)
    with pytest.raises(CorruptFile, match=r"data is torn: it ends after \d+ bytes"):
        io.read(file, 0, allocate(SIZE)).result(timeout=10)
    io.read(file, 0, allocate(PAGE)).result(timeout=10) if size else None
    file.close()


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="is missing: the offload folder was removed"):
        DirectFile(tmp_path / "nowhere")
    with pytest.raises(FlexGenError, match=f"{tmp_path} cannot be read or written: Is a directory"):
        DirectFile(tmp_path, os.O_RDWR)


def test_pieces_that_fail_surface_and_later_requests_work(io: DiskIO, path: Path) -> None:
    read_only, memory = DirectFile(path), allocate(SIZE)
    with pytest.raises(FlexGenError, match="data cannot be read or written: Bad file descriptor"):
        io.write(read_only, 0, memory).result(timeout=10)
    io.read(read_only, 0, memory).result(timeout=10)
    assert memory.numpy().tobytes() == path.read_bytes()
    read_only.close()


def test_only_whole_pages(io: DiskIO, path: Path) -> None:
    file, memory = DirectFile(path), allocate(SIZE)
    for offset, into in [(7, memory), (0, memory[7:]), (0, memory[:7]), (0, memory[:0])]:
        with pytest.raises(ValueError, match="not whole pages"):
            io.read(file, offset, into)
    file.close()


def test_close_leaves_nobody_waiting(path: Path) -> None:
    io, file, memory = DiskIO(num_threads=1), DirectFile(path), allocate(SIZE)
    begun, go = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        go.wait(10)

    first = io.read(file, 0, memory, hold)
    second = io.read(file, 0, allocate(SIZE))
    begun.wait(10)
    closing = threading.Thread(target=io.close)
    closing.start()
    while not io._closed:
        time.sleep(0.001)
    go.set()
    first.result(timeout=10)
    with pytest.raises(FlexGenError, match="was closed before"):
        second.result(timeout=10)
    closing.join()
    file.close()


@pytest.mark.parametrize("limit", [PIECE + PAGE, PIECE + PAGE + 100])
@pytest.mark.parametrize("direct", [True, False])
def test_full_disk(io: DiskIO, path: Path, direct: bool, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file size limit stands for a disk that is full, also one within a page, of which a part is written."""
    if not direct:
        refuse_direct(monkeypatch)
    file = DirectFile(path, os.O_RDWR | os.O_TRUNC)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(DiskFull, match=r"data cannot be written: .* another offload_folder"):
            io.write(file, 0, allocate(2 * PIECE)).result(timeout=10)  # one of two pieces fails
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    io.write(file, 0, allocate(SIZE)).result(timeout=10)
    assert path.stat().st_size == SIZE
    file.close()
