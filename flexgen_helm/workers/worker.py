"""The function that runs in a worker: answers a share by an engine of its own, into a journal of its own."""

from __future__ import annotations

import os
import socket

from helm.common.hierarchical_logger import hlog, setup_default_logging

from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.console import Console
from flexgen_helm.helm.journal import Journal
from flexgen_helm.helm.registry import EngineRegistry
from flexgen_helm.helm.response_cache import ResponseCache
from flexgen_helm.helm.workload import EngineServer, serve
from flexgen_helm.workers.share import KERNELS, Outcome, Place, Refusal, Share


def answer_in_process(share: Share) -> Outcome | Refusal:
    """Answer a share in a process that does nothing else.

    Returns:
        A refusal where every attempt would meet the same error. Only the loss of the process is worth another attempt.
    """
    try:
        _settle_in(share.place)
        return answer(share, EngineRegistry())
    except FlexGenError as error:
        hlog(f"{type(error).__name__}: {error}")
        return Refusal(socket.gethostname(), error)


def answer(share: Share, engines: EngineRegistry) -> Outcome:
    """Answer a share. What is in HELM's cache or in any journal of the suite is not computed again.

    Raises:
        FlexGenError: The folder of results is not shared, or there is no engine for the deployment.
        DiskFull: There is no space left for answers.
    """
    place = share.place
    place.meeting.find()
    console = Console(None)  # nobody sits before it
    try:
        with Journal(place.journals, place.runs, helps=True) as journal:
            journal.note_helper(worker=share.number, host=socket.gethostname(), process=os.getpid())
            if share.policy:
                journal.note_policy(share.deployment.name, share.policy)
            server = EngineServer(engines, journal, console, place.meeting.agree)
            served = serve(share.deployment, share.requests, _ReadCache(place.cache), journal, server, console)
    finally:
        engines.close()
    failures = {index: result for index, result in enumerate(served.results) if not result.success}
    return Outcome(served.report.engine, served.report.stats, tuple(served.sources), failures)


class _ReadCache(ResponseCache):
    """HELM's cache, of which the command alone writes: one file of SQLite bears no writers on several hosts."""

    def write(self, items: object) -> None:
        """Leave it to the command, which finds the answers in the journal."""


def _settle_in(place: Place) -> None:
    """Make this process compute as the command's would, before it imports torch.

    Raises:
        FlexGenError: The working folder is not there.
    """
    setup_default_logging()
    for name in [name for name in os.environ if name.startswith(KERNELS)]:
        del os.environ[name]  # Ray sets some, and a host may have others than the command's
    os.environ.update(place.variables)
    try:
        os.chdir(place.working_folder)
    except OSError as error:
        raise FlexGenError(
            f"The worker on {socket.gethostname()} has no folder {place.working_folder} ({error}), in which the command was "
            "started. Start it in a folder that all hosts mount at the same path."
        ) from error
    import torch

    torch.set_num_threads(place.threads)
