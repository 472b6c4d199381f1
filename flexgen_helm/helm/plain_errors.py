"""Errors that are their user's to mend end ``helm-run`` with their message, not with a traceback of this package's code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from types import TracebackType

from helm.benchmark.executor import ExecutorError
from helm.benchmark.runner import RunnerError

from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.console import SPEAKER

ON_PURPOSE = (FlexGenError, ExecutorError, RunnerError)
"""Errors whose message says everything; the last two are HELM's for requests and runs that have failed."""


def described(error: Exception) -> str:
    """Return the message of an error that was raised on purpose, the traceback of any other."""
    if isinstance(error, ON_PURPOSE):
        return f"{type(error).__name__}: {error}"
    return "".join(traceback.format_exception(error))


class PlainErrors:
    """A hook of Python's for errors that end the process. HELM's commands catch nothing, so no other place is left."""

    def __init__(self, others: Callable[..., object]) -> None:
        """Args: others: The hook for all other errors."""
        self._others = others

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Show the message of an error that was raised on purpose, in one line."""
        if isinstance(error, ON_PURPOSE):
            print(f"{SPEAKER}{kind.__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            self._others(kind, error, trace)

    @classmethod
    def install(cls) -> None:
        """Let it show the errors of this process."""
        if not isinstance(sys.excepthook, cls):
            sys.excepthook = cls(sys.excepthook)
