"""Cases in a process of their own, which is ended where one hangs."""

from __future__ import annotations

import os
import signal
import traceback
from contextlib import suppress
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from flexgen_helm.runs.fault_matrix.outcomes import MOST_NOTE, Case, Outcome

OPENING_S = 600.0
"""A part is ready by then."""


class Part(Protocol):
    """Faults of one kind. It is made in the worker, in which all of its cases run."""

    def run(self, case: str) -> list[Outcome]:
        """Try a case; an error that it raises counts as a traceback."""
        ...


class Maker(Protocol):
    """Makes a part in a folder of its own, whose content may be there from an earlier worker."""

    def __call__(self, folder: Path) -> Part:
        """Make the part."""
        ...


def make(name: str, folder: Path) -> Part:
    """Make a part of this package, which is imported only now: with torch and HELM it takes ten seconds.

    Args:
        name: Module within this package, a colon, and the class.
        folder: Of the part.
    """
    module, _, kind = name.partition(":")
    part: Part = getattr(import_module(f"flexgen_helm.runs.fault_matrix.{module}"), kind)(folder)
    return part


class Worker:
    """Runs the cases of a part."""

    def __init__(self, maker: Maker, folder: Path, log: Path) -> None:
        """Nothing is started before the first case.

        Args:
            maker: Makes the part; a function of a module, so that another process finds it.
            folder: Of the part.
            log: File to which everything is appended that is printed meanwhile.
        """
        self._maker, self._folder, self._log = maker, folder, log
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def run(self, case: Case) -> list[Outcome]:
        """Run a case; where it hangs or ends the process, that is its outcome."""
        if self._process is None:
            self._start()
        assert self._connection is not None
        assert self._process is not None
        try:
            self._connection.send(case.name)
            if self._connection.poll(case.seconds):
                outcomes: list[Outcome] = self._connection.recv()
                return outcomes
            found = Outcome(_fault_of(case.name), "hung", note=f"{case.name}: no end after {case.seconds:.0f} s")
        except (EOFError, OSError):
            self._process.join(10)
            status = self._process.exitcode
            note = f"{case.name}: the process ended with status {status}; see {self._log}"
            found = Outcome(_fault_of(case.name), "traceback", note=note)
        self.close()
        return [found]

    def close(self) -> None:
        """End the process and what it has started."""
        if self._process is not None and self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()
        self._process = self._connection = None

    def _start(self) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._maker, self._folder, self._log))
        self._process.start()
        theirs.close()
        if not self._connection.poll(OPENING_S):
            self.close()
            raise TimeoutError(f"{self._folder.name} is not ready after {OPENING_S:.0f} s; see {self._log}")
        try:
            self._connection.recv()
        except EOFError:
            self.close()
            raise RuntimeError(f"{self._folder.name} cannot be prepared; see {self._log}") from None


def _fault_of(case: str) -> str:
    """Return the row of the table for a case that has no outcome of its own."""
    return case.partition(" ")[0].replace("_", " ")


def _serve(connection: Connection, maker: Maker, folder: Path, log: Path) -> None:
    os.setsid()  # so that what hangs is ended with everything that it has started
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    folder.mkdir(parents=True, exist_ok=True)
    part = maker(folder)
    connection.send("ready")
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        try:
            found = part.run(case)
        except Exception as error:
            traceback.print_exc()
            trace = traceback.format_exc()[-MOST_NOTE:]
            found = [Outcome(_fault_of(case), "traceback", note=f"{case}: {type(error).__name__}: {error}\n{trace}")]
        connection.send(found)
