"""Prints a run for a person while HELM's own log goes to a file: one line for each step, and one progress bar."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, TypeVar

from helm.common.hierarchical_logger import hlog

from flexgen_helm.runtime.bars import make_bar
from flexgen_helm.runtime.progress import LINE_SECONDS

T = TypeVar("T")
SPEAKER = "flexgen-helm: "
"""Begins the line with which a command says why it ends."""
VARIABLE = "FLEXGEN_HELM_CONSOLE"
"""Environment variable with the number of the open file that `flexgen-helm eval` hands to `helm-run`."""


class Console:
    """The screen of `flexgen-helm eval`, or for `helm-run` alone HELM's log and standard error."""

    def __init__(self, stream: TextIO | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: stream: The screen; None: HELM's log is on it already. clock: Seconds, for tests."""
        self.stream, self._clock = stream, clock

    @classmethod
    def of_process(cls) -> Console:
        """Return the console that the process was given."""
        number = os.environ.get(VARIABLE, "")
        try:
            return cls(os.fdopen(int(number), "w", buffering=1, closefd=False))
        except (ValueError, OSError):  # not given, or not to this process but to its parent
            return cls(None)

    def say(self, text: str) -> None:
        """Print one line, which stands in HELM's log too."""
        hlog(text)
        if self.stream is not None:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def showing(self, name: str) -> Iterator[None]:
        """Show what a logger says, where HELM's log is not on the screen."""
        if self.stream is None:
            yield
            return
        handler, shown = logging.StreamHandler(self.stream), logging.getLogger(name)
        level = shown.level
        shown.addHandler(handler)
        shown.setLevel(logging.INFO)
        try:
            yield
        finally:
            shown.removeHandler(handler)
            shown.setLevel(level)

    def each(self, items: Sequence[T], what: str) -> Iterator[T]:
        """Yield items behind a bar, or with a line every half minute where there is no terminal."""
        said = self._clock()
        bar = make_bar(items, desc=what, stream=self.stream)
        for done, item in enumerate(bar):
            if bar.disable and self._clock() - said >= LINE_SECONDS:
                said = self._clock()
                self.say(f"{what}: {done} of {len(items)} are done")
            yield item
