"""Workers that write down what they compute, and end when they are told to."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from flexgen_helm.helm.journal import Journal
from flexgen_helm.helm.requests import Response
from flexgen_helm.runs.kill_test.__main__ import journal_keys
from flexgen_helm.workers.options import Workers
from flexgen_helm.workers.ray_pool import RayPool
from flexgen_helm.workers.runner import RayRunner
from flexgen_helm.workers.serving import Pool
from flexgen_helm.workers.share import Outcome, Refusal, Share
from flexgen_helm.workers.worker import answer_in_process

ANSWERS = 3
"""So many are durable in a worker before it ends."""


def computed_file(folder: Path) -> Path:
    """The file of all keys that were computed: the worker's number, its process, and the key, before it can be durable."""
    return folder / "computed.txt"


def killed_file(folder: Path) -> Path:
    """The file in which the keys stand that were durable when a worker was killed."""
    return folder / "durable.txt"


def watched(share: Share, when: str) -> Outcome | Refusal:
    """Answer a share; worker 1 is killed once or always, or every worker waits for ever, with `ANSWERS` durable answers."""
    append, done = Journal.append, 0
    folder = share.place.journals.parent
    keys = os.open(computed_file(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def written(journal: Journal, key: str, response: Response) -> None:
        nonlocal done
        digest = hashlib.sha256(key.encode()).hexdigest()
        os.write(keys, f"{share.number} {os.getpid()} {digest}\n".encode())
        append(journal, key, response)
        done += 1
        if done == ANSWERS:
            _end(when, share.number, folder)

    Journal.append = written  # type: ignore[method-assign, assignment]
    return answer_in_process(share)


def _end(when: str, number: int, folder: Path) -> None:
    if when == "wait":
        (folder / f"waits-{number}").touch()
        time.sleep(600)
    if number != 1 or when == "never" or (when == "once" and killed_file(folder).exists()):
        return
    killed_file(folder).write_text("\n".join(journal_keys(folder)))
    os.kill(os.getpid(), signal.SIGKILL)


def once(share: Share) -> Outcome | Refusal:
    return watched(share, "once")


def always(share: Share) -> Outcome | Refusal:
    return watched(share, "always")


def never(share: Share) -> Outcome | Refusal:
    return watched(share, "never")


def wait(share: Share) -> Outcome | Refusal:
    return watched(share, "wait")


class KilledOnce(RayRunner):
    """The process of worker 1 is killed once, half-way."""

    task: Any = staticmethod(once)
    retries = 3

    def make_pool(self, workers: Workers) -> Pool:
        return RayPool(workers, task=self.task, retries=self.retries)


class KilledAlways(KilledOnce):
    """Every process of worker 1 is killed."""

    task = staticmethod(always)
    retries = 1


class Undisturbed(KilledOnce):
    """Nothing is killed."""

    task = staticmethod(never)


class Waiting(KilledOnce):
    """Workers answer a few requests and wait."""

    task = staticmethod(wait)
