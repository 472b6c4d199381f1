"""Liveness: every stage of a pipeline shows that it lives, and notices which of the others do not."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from torch.distributed.distributed_c10d import Store

BEAT_SECONDS = 0.5
LOST_SECONDS = 20.0
"""Seconds without a beat after which a stage is given up."""
DIAGNOSIS_SECONDS = 4.0
"""Seconds without a beat that mark the lost stage, once a connection has broken."""


class Liveness:
    """Writes this stage's beats into the store that all share, and reads those of the others, in a thread of its own."""

    def __init__(self, store: Store, index: int, count: int, on_lost: Callable[[list[int]], None]) -> None:
        """Begin to show beats.

        Args:
            store: Store that all stages reach. It outlives them if a launcher has it, else it ends with the first stage.
            index: This stage.
            count: All stages.
            on_lost: Called once, in the thread, with the stages that are lost.
        """
        self._store, self._index, self._on_lost = store, index, on_lost
        self._others = [stage for stage in range(count) if stage != index]
        now = time.monotonic()
        self._seen: dict[int, tuple[bytes, float]] = dict.fromkeys(self._others, (b"", now))
        self._ended = threading.Event()
        self._show(0)
        self._thread = threading.Thread(target=self._watch, name="flexgen-helm-liveness", daemon=True)
        self._thread.start()

    def note(self, text: str) -> None:
        """Say why this stage ends, for those who look for the one that ended first. Nothing happens if the store is gone."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"note/{self._index}", text)

    def diagnose(self) -> list[int]:
        """Return the stages that ended without a word; waits a few seconds for their beats to stay away."""
        begun = time.monotonic()
        while time.monotonic() - begun < DIAGNOSIS_SECONDS + 2 * BEAT_SECONDS:
            silent = [stage for stage in self._silent(DIAGNOSIS_SECONDS) if not self._has_note(stage)]
            if silent:
                return silent
            time.sleep(BEAT_SECONDS)
        return []

    def end(self) -> None:
        """Show no more beats and watch nobody.

        A process must not end while the thread asks the store, which may take some round trips: Python would end the thread in
        the middle of a call of C++, and that aborts the process.
        """
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(LOST_SECONDS)

    def _watch(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._show(beat)
                self._read()
            except RuntimeError:  # the store is gone, and with it the stage or the launcher that had it
                if not self._ended.is_set():
                    self._on_lost([0] if self._index else [])
                return
            lost = self._silent(LOST_SECONDS)
            if lost and not self._ended.is_set():
                self._on_lost([stage for stage in lost if not self._has_note(stage)] or lost)
                return

    def _show(self, beat: int) -> None:
        self._store.set(f"beat/{self._index}", str(beat))

    def _read(self) -> None:
        for stage in self._others:
            key = f"beat/{stage}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            if beat != self._seen[stage][0]:
                self._seen[stage] = beat, time.monotonic()

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [stage for stage, (_, at) in self._seen.items() if now - at > seconds]

    def _has_note(self, stage: int) -> bool:
        try:
            return bool(self._store.check([f"note/{stage}"]))
        except RuntimeError:
            return False
