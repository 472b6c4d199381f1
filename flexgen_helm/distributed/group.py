"""The processes of a pipeline: one stage each, started by `torchrun` or by hand with its environment variables."""

from __future__ import annotations

import logging
import pickle
import queue
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from flexgen_helm.distributed import mailbox
from flexgen_helm.distributed.channel import Delivery
from flexgen_helm.distributed.liveness import Liveness
from flexgen_helm.distributed.messages import End, Message
from flexgen_helm.errors import FlexGenError, StageLost

logger = logging.getLogger(__name__)

FOREVER = timedelta(days=30)
"""Between two sweeps HELM may compute metrics for hours; a stage that is lost is noticed by its beats."""
POLL_SECONDS = 0.02
END_SECONDS = 20.0
"""Seconds that a stage waits for the others at its end."""
AGAIN = "Answers that were given so far are kept: start the same command again, and it goes on behind them."
Value = TypeVar("Value")


class StageGroup:
    """All stages of a pipeline, as one of them sees them."""

    def __init__(self, *, store: Store, index: int, count: int, on_lost: Callable[[StageLost], None]) -> None:
        """Meet the other stages. `from_environment` is what users call.

        Args:
            store: Store that all stages reach.
            index: This stage.
            count: All stages.
            on_lost: Called in a thread if a stage is lost, in addition to what waits in `next_message`.
        """
        self.index, self.count = index, count
        self._on_lost, self._lost, self._ended = on_lost, list[StageLost](), False
        dist.init_process_group("gloo", store=PrefixStore("group", store), rank=index, world_size=count, timeout=FOREVER)
        self._store = PrefixStore("flexgen_helm", store)
        self._store.set(f"host/{index}", socket.gethostname())
        self._messages = self.new_group("gloo")
        self._epoch = 0
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.on_message: Callable[[Message], None] = lambda message: None
        """Called with each message as soon as it comes, in a thread, before it can be taken."""
        self.before_end: Callable[[], None] = lambda: None
        """Called when this stage begins to part from the others, unless one is lost."""
        self._liveness = Liveness(self._store, index, count, self._lose)
        senders = [0] if index else range(1, count)
        self._listeners = [mailbox.listen(stage, self._messages, self._receive, self._break) for stage in senders]

    @classmethod
    def from_environment(cls, on_lost: Callable[[StageLost], None] = lambda error: None) -> StageGroup:
        """Meet the other stages that `torchrun`, or whoever set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, started.

        Raises:
            FlexGenError: If they cannot be reached.
        """
        try:
            store, index, count = next(iter(rendezvous("env://", timeout=FOREVER)))
            return cls(store=store, index=index, count=count, on_lost=on_lost)
        except (RuntimeError, ValueError) as error:
            raise FlexGenError(
                f"The stages of the pipeline cannot reach each other ({error}). Start them with torchrun, or give each process "
                "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
            ) from error

    @property
    def is_first(self) -> bool:
        """Whether this stage has the embeddings, and plans."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage has the output head."""
        return self.index == self.count - 1

    @property
    def is_broken(self) -> bool:
        """Whether a stage is lost."""
        return bool(self._lost)

    def name(self, stage: int) -> str:
        """Return a stage in words."""
        host = self._store.get(f"host/{stage}").decode() if self._store.check([f"host/{stage}"]) else "an unknown host"
        return f"stage {stage + 1} of {self.count} (rank {stage} on {host})"

    def send(self, message: Message, stage: int) -> list[Delivery]:
        """Start to send a message.

        Raises:
            StageLost: If the connection is broken.
        """
        self.raise_if_lost()
        with self.noticing():
            return mailbox.send(message, stage, self._messages)

    def send_and_wait(self, message: Message, stage: int) -> None:
        """Send a message and wait until it is delivered.

        Raises:
            StageLost: If the connection is broken.
        """
        self.wait_for(self.send(message, stage))

    def wait_for(self, deliveries: Sequence[Delivery]) -> None:
        """Wait until some tensors are delivered.

        Raises:
            StageLost: If the connection is broken.
        """
        with self.noticing():
            for work, _ in deliveries:
                work.wait()

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Tell which stage is lost if torch.distributed fails in the body of the `with` statement.

        Raises:
            StageLost: If it fails.
        """
        try:
            yield
        except RuntimeError as error:
            self._break(error)
            raise self.loss() from error

    def next_message(self) -> Message:
        """Wait for the next message, of any stage.

        Raises:
            StageLost: If a stage is lost.
        """
        while True:
            try:
                return self._inbox.get(timeout=1.0)
            except queue.Empty:
                self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raise `StageLost` if a stage is lost."""
        if self._lost:
            raise self._lost[0]

    def loss(self) -> StageLost:
        """Return the error of the stage that was lost first."""
        return self._lost[0] if self._lost else StageLost(f"The connection to a stage of the pipeline is broken. {AGAIN}")

    def look_for_lost(self) -> None:
        """Find out whether a stage has ended, which takes a few seconds."""
        if not self._ended and not self._lost:
            stages = self._liveness.diagnose()
            if stages:
                self._lose(stages)

    def new_group(self, backend: str) -> dist.ProcessGroup:
        """Connect the stages once more. All must call it."""
        group = dist.new_group(backend=backend, timeout=FOREVER)
        assert isinstance(group, dist.ProcessGroup)
        return group

    def begin_epoch(self) -> None:
        """Begin to make an engine; all stages must call it."""
        self._epoch += 1

    def exchange(self, name: str, value: Value) -> list[Value]:
        """Give a value to all stages and return theirs, by stage.

        Raises:
            FlexGenError: If a stage failed in this epoch; with its own error.
            StageLost: If one is lost.
        """
        keys = [f"{self._epoch}/{name}/{stage}" for stage in range(self.count)]
        self._set(keys[self.index], pickle.dumps(value))
        return [pickle.loads(self._get(key)) for key in keys]

    @contextmanager
    def first_stage_first(self, name: str) -> Iterator[None]:
        """Let the first stage go through the body of the `with` statement before the others do, which find what it made."""
        if not self.is_first:
            self._get(f"{self._epoch}/done/{name}")
        yield
        if self.is_first:
            self._set(f"{self._epoch}/done/{name}", b"")

    def fail(self, error: BaseException) -> None:
        """Tell the others that this stage's engine cannot be made."""
        text = str(error) if isinstance(error, FlexGenError) else f"{type(error).__name__}: {error}"
        self._set(f"{self._epoch}/failed/{self.index}", text.encode())

    def end(self) -> None:
        """Part from the other stages; the first one ends them, and they tell it that they end."""
        if self._ended:
            return
        if not self._lost:
            self.before_end()
            for stage in range(1, self.count) if self.is_first else [0]:
                self.send_and_wait(End(), stage)
        self._ended = True
        self._liveness.note("ended")
        self._liveness.end()
        # Each ends with the `End` of its stage: Python would end it in the middle of a call of C++, which aborts the process.
        for listener in self._listeners:
            listener.join(END_SECONDS)
        if not any(listener.is_alive() for listener in self._listeners):
            dist.destroy_process_group()

    def note(self, text: str) -> None:
        """Say why this stage ends, so that nobody takes it for the one that ended first."""
        self._liveness.note(text)

    def _set(self, key: str, value: bytes) -> None:
        try:
            self._store.set(key, value.hex())
        except RuntimeError as error:
            raise StageLost(f"The store of the pipeline cannot be reached ({error}). {AGAIN}") from error

    def _get(self, key: str) -> bytes:
        failed = [f"{self._epoch}/failed/{stage}" for stage in range(self.count)]
        try:
            while not self._store.check([key]):
                self.raise_if_lost()
                for stage in range(self.count):
                    if stage != self.index and self._store.check([failed[stage]]):
                        raise FlexGenError(
                            f"{self.name(stage)}: {bytes.fromhex(self._store.get(failed[stage]).decode()).decode()}"
                        )
                time.sleep(POLL_SECONDS)
            return bytes.fromhex(self._store.get(key).decode())
        except RuntimeError as error:
            raise StageLost(f"The store of the pipeline cannot be reached ({error}). {AGAIN}") from error

    def _receive(self, message: Message) -> bool:
        self.on_message(message)
        self._inbox.put(message)
        return not isinstance(message, End)

    def _break(self, error: RuntimeError) -> None:
        """Find out who is lost when a connection has broken."""
        if not self._ended and not self._lost:
            logger.info("a connection between stages is broken: %s", error)
            self._lose(self._liveness.diagnose())

    def _lose(self, stages: list[int]) -> None:
        if self._ended or self._lost:
            return
        who = " and ".join(map(self._name, stages)) if stages else "a stage"
        self._lost.append(StageLost(f"The pipeline has lost {who}: it has ended or cannot be reached. {AGAIN}"))
        self._liveness.note(f"lost {who}")
        self._on_lost(self._lost[0])

    def _name(self, stage: int) -> str:
        try:
            return self.name(stage)
        except RuntimeError:
            return f"stage {stage + 1} of {self.count} (rank {stage})"
