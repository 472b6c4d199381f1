"""Commands in a memory cgroup of their own, of version 1 or 2."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from flexgen_helm.errors import FlexGenError

PREFIX = "flexgen_helm_"
REMOVAL_S = 10.0
"""Processes that were killed leave a group within this time, or it stays."""


class NotPermitted(FlexGenError):
    """This process may not limit the memory of others."""


class _Version(NamedTuple):
    """Names of the parts of memory cgroups in one of their versions."""

    mount: str
    """Below /sys/fs/cgroup."""
    limit: str
    swap: str
    """Version 1 limits memory and swap together, version 2 swap alone."""
    events: str
    """File with the number of processes that were killed."""


VERSION_1 = _Version("memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control")
VERSION_2 = _Version("", "memory.max", "memory.swap.max", "memory.events")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    """Exit status as ``subprocess`` gives it: negative for a signal."""
    seconds: float
    out_of_memory: bool = False
    """Whether the kernel killed one of its processes because the group's memory was used up."""


class MemoryGroup:
    """A limit on the memory of all processes in it, page cache that they bring in included; none of it goes to swap."""

    def __init__(self, folder: Path, version: _Version) -> None:
        self._folder, self._version = folder, version

    def run(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Ended:
        """Run a command to its end inside of the group; arguments are those of `run_free`."""
        killed = self._num_killed()
        # The shell enters the group before the command takes any memory.
        entering = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._folder / "cgroup.procs")]
        ended = run_free([*entering, *command], log, environment)
        return replace(ended, out_of_memory=self._num_killed() > killed)

    def _num_killed(self) -> int:
        lines = (self._folder / self._version.events).read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def run_free(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Ended:
    """Run a command to its end without a limit.

    Args:
        command: With its arguments.
        log: For all that it prints; written anew.
        environment: Variables to add.
    """
    begun = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        variables = {**os.environ, **environment}
        process = subprocess.run(command, check=False, stdout=file, stderr=subprocess.STDOUT, env=variables)
    return Ended(process.returncode, time.perf_counter() - begun)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a group with a limit and remove it afterwards, with everything that still runs in it.

    Groups that earlier, killed processes left behind are removed as well.

    Raises:
        NotPermitted: If this process may not make one; the message says what would help.
    """
    folder, version = _make_folder()
    try:
        try:
            (folder / version.limit).write_text(str(limit_bytes))
            with suppress(OSError):  # a kernel that does not account for swap has no such file
                (folder / version.swap).write_text(str(limit_bytes if version is VERSION_1 else 0))
        except OSError as error:
            raise NotPermitted(f"{folder} was made, but its limit cannot be set ({error}). Run as root.") from None
        yield MemoryGroup(folder, version)
    finally:
        _remove(folder)


def _make_folder() -> tuple[Path, _Version]:
    reason = "there is no memory controller in /proc/self/cgroup"
    for parent, version in _parents():
        folder = parent / f"{PREFIX}{os.getpid()}"
        try:
            _remove_old(parent)
            folder.mkdir()
        except OSError as error:
            reason = str(error)
            continue
        if (folder / version.limit).exists():
            return folder, version
        folder.rmdir()
        reason = f"the memory controller is not enabled for groups in {parent}"
    raise NotPermitted(
        f"The memory of a process cannot be limited here: {reason}. Run as root, in a container with --privileged and its own "
        "cgroup, or with `systemd-run --user --scope -p Delegate=yes`."
    )


def _remove_old(parent: Path) -> None:
    for old in parent.glob(f"{PREFIX}*"):
        owner = int(old.name.removeprefix(PREFIX))
        if owner == os.getpid() or not Path(f"/proc/{owner}").exists():
            with suppress(OSError):  # something still runs in it
                old.rmdir()


def _parents() -> Iterator[tuple[Path, _Version]]:
    """Yield folders in which a group may be made: that of this process, then those further up, where only our limit holds."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        version = VERSION_2 if number == "0" else VERSION_1
        mount = Path("/sys/fs/cgroup") / version.mount
        own = mount / path.lstrip("/")
        yield from ((folder, version) for folder in (own, *own.parents) if folder.is_relative_to(mount) and folder.exists())


def _remove(folder: Path) -> None:
    stop = time.monotonic() + REMOVAL_S
    while folder.exists() and time.monotonic() < stop:
        with suppress(OSError):
            for number in (folder / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(number), 9)
            folder.rmdir()
            return
        time.sleep(0.05)
