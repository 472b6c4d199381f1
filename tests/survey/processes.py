"""Judgements in processes of their own, so that one that dies or hangs takes nothing with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess

from tests.survey.judge import Verdict, judge

EXIT_SECONDS = 10.0
"""Time that a process has to end after its verdict."""
Judge = Callable[[str], Verdict]


@dataclass
class _Running:
    """One judgement in progress."""

    name: str
    process: ForkServerProcess
    answer: Connection
    deadline: float
    """Seconds of the monotonic clock."""


def judge_all(names: Sequence[str], *, jobs: int, timeout: float, work: Judge = judge) -> Iterator[Verdict]:
    """Judges types and variants, each in its own process.

    Args:
        names: Of types or variants.
        jobs: Processes at once.
        timeout: Seconds after which a process is killed.
        work: What a process does; a function of a module.

    Yields:
        A verdict as each process ends.
    """
    context = multiprocessing.get_context("forkserver")
    # One process imports torch and transformers; the others are copies of it.
    context.set_forkserver_preload(["tests.survey.judge"])
    waiting, running = deque(names), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, waiting.popleft(), timeout, work))
            wait([one.answer for one in running], timeout=max(0.0, min(one.deadline for one in running) - time.monotonic()))
            for one in [one for one in running if one.answer.poll() or one.deadline <= time.monotonic()]:
                running.remove(one)
                yield _verdict(one, timeout)
    finally:
        for one in running:
            one.process.kill()


def _start(context: ForkServerContext, name: str, timeout: float, work: Judge) -> _Running:
    answer, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, name, sender))
    process.start()
    # Only the child holds the other end now, so that its death ends the pipe.
    sender.close()
    return _Running(name, process, answer, time.monotonic() + timeout)


def _child(work: Judge, name: str, sender: Connection) -> None:
    # What libraries print would mix with the progress of the survey.
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    sender.send(work(name))


def _verdict(one: _Running, timeout: float) -> Verdict:
    try:
        if not one.answer.poll():
            return Verdict(one.name, "crashed", f"time limit of {timeout:g} s", seconds=timeout)
        verdict: Verdict = one.answer.recv()
        one.process.join(EXIT_SECONDS)
        return verdict
    except EOFError:
        one.process.join()
        return Verdict(one.name, "crashed", _ending(one.process.exitcode))
    finally:
        one.process.kill()
        one.process.join()
        one.answer.close()


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"ended by {signal.Signals(-exitcode).name}"
    return f"ended with exit status {exitcode} and no verdict"
