"""Copies between host and device that run beside the computation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch


class Transfer(Protocol):
    """Something on its way."""

    def wait(self) -> None:
        """Let the computation that follows see what arrives; raises what went wrong on the way."""


class Started:
    """What a thread does, and on a GPU what the stream of its copies does after that."""

    def __init__(self, future: Future[torch.cuda.Event | None], device: torch.device) -> None:
        self._future, self._device = future, device

    def wait(self) -> None:
        """Wait for the thread; the GPU waits for itself."""
        event = self._future.result()
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


class Link:
    """A thread, and on a GPU a stream, in which work runs in the order of its submission."""

    def __init__(self, device: torch.device, name: str) -> None:
        """Nothing runs before the first work is submitted."""
        self._device = device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"flexgen-helm-{name}")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, work: Callable[[], None]) -> Transfer:
        """Run work after everything that the computation has been asked for so far."""
        before = None
        if self._stream is not None:
            before = torch.cuda.Event()
            before.record(torch.cuda.current_stream(self._device))
        return Started(self._pool.submit(self._run, work, before), self._device)

    def close(self) -> None:
        """Wait for what runs, drop what does not."""
        self._pool.shutdown(cancel_futures=True)

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
                    self._stream.synchronize()  # what was begun must not go on in memory that others get
                    raise
                after = torch.cuda.Event()
                after.record(self._stream)
                return after
