"""Links: threads and streams that copy between tiers in parallel with the computation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch


class Transfer(Protocol):
    """A copy that was started and may not have ended."""

    def wait(self) -> None:
        """Make the computation that follows see the copied data; raise the error of the copy if it failed."""


class Started:
    """A transfer that a link's thread runs; on a GPU it ends when the link's stream has done its copies."""

    def __init__(self, future: Future[torch.cuda.Event | None], device: torch.device) -> None:
        self._future, self._device = future, device

    def wait(self) -> None:
        """Wait for the thread; on a GPU the current stream waits for the copies, not this thread."""
        event = self._future.result()
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


class Link:
    """A thread, and on a GPU a stream, that runs copies in the order in which they were submitted."""

    def __init__(self, device: torch.device, name: str) -> None:
        """Start no thread before the first copy is submitted.

        Args:
            device: Device whose streams the copies follow.
            name: End of the thread's name.
        """
        self._device = device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"flexgen-helm-{name}")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, work: Callable[[], None]) -> Transfer:
        """Run a function in the link's thread; on a GPU its copies wait for everything on the current stream so far."""
        before = None
        if self._stream is not None:
            before = torch.cuda.Event()
            before.record(torch.cuda.current_stream(self._device))
        return Started(self._pool.submit(self._run, work, before), self._device)

    def close(self) -> None:
        """Wait for the copies that have begun, on a GPU until they are done, and drop the others."""
        self._pool.shutdown(cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()  # the memory of its copies may be freed and unpinned now

    def _run(self, work: Callable[[], None], before: torch.cuda.Event | None) -> torch.cuda.Event | None:
        with torch.inference_mode():
            if self._stream is None:
                work()
                return None
            with torch.cuda.stream(self._stream):
                assert before is not None
                self._stream.wait_event(before)
                try:
                    work()
                except BaseException:
                    self._stream.synchronize()  # its copies must not continue in memory that is used again
                    raise
                after = torch.cuda.Event()
                after.record(self._stream)
                return after
