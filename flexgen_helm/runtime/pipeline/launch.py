"""Start of a pipeline: which processes drive and which follow, and how they end."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import mkstemp
from typing import NoReturn

from flexgen_helm.distributed.group import StageGroup
from flexgen_helm.errors import StageLost
from flexgen_helm.processes import DRIVES, Terminated, num_processes

MET = "met"
LOST_EXIT = 3
"""Exit code of a stage that lost another."""


def begin_to_drive() -> None:
    """Let engines of this process and of its children be divided into stages, one for each process."""
    if DRIVES not in os.environ:
        descriptor, path = mkstemp(prefix="flexgen-helm-pipeline-")
        os.close(descriptor)
        os.environ[DRIVES] = path


def driven_group() -> StageGroup | None:
    """Return the stages that this process drives; None: engines are not divided. They meet at the first call."""
    return met_group() if DRIVES in os.environ and num_processes() > 1 else None


@cache
def met_group() -> StageGroup:
    """Meet the stages that this process drives, once."""
    Path(os.environ[DRIVES]).write_text(MET)
    group = StageGroup.from_environment()
    atexit.register(group.end)
    _on_sigterm(partial(_end_by_signal, group))
    return group


@contextmanager
def driving() -> Iterator[None]:
    """Divide the engines of a command into stages; behind it the other stages end, also if no engine met them."""
    if DRIVES in os.environ:  # the process that started this one ends them
        yield
        return
    begin_to_drive()
    mark = Path(os.environ[DRIVES])
    _on_sigterm(_raise_terminated)
    try:
        yield
    finally:
        if mark.read_text() != MET:
            met_group().end()
        mark.unlink(missing_ok=True)


def follow_first() -> int:
    """Follow the first process until it ends this one; returns the exit code."""
    from flexgen_helm.runtime.pipeline.follower import follow

    group = StageGroup.from_environment(on_lost=_end_follower)
    try:
        follow(group)
    except StageLost as error:
        _end_follower(error)
    group.end()
    return 0


def _on_sigterm(end: Callable[[], NoReturn]) -> None:
    """Let the first SIGTERM call a function in the main thread; others do nothing. Another thread cannot ask for that."""

    def handle(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handle)


def _raise_terminated() -> NoReturn:
    raise Terminated(128 + signal.SIGTERM)


def _end_follower(error: StageLost) -> None:
    """End this process at once: its threads may wait for what never comes, and it has nothing to lose."""
    print(f"flexgen-helm: {error}", file=sys.stderr, flush=True)
    os._exit(LOST_EXIT)


def _end_by_signal(group: StageGroup) -> NoReturn:
    """Say which stage is lost when a launcher ends all others because of it."""
    group.look_for_lost()
    if group.is_broken:
        print(f"flexgen-helm: {group.loss()}", file=sys.stderr, flush=True)
    _raise_terminated()
