"""A stage that is not the first: it makes its part of each engine, and computes the sweeps that are ordered."""

from __future__ import annotations

import logging
import time
from collections import deque
from itertools import islice

from torch import Tensor

from flexgen_helm.distributed.channel import Delivery
from flexgen_helm.distributed.group import StageGroup
from flexgen_helm.distributed.messages import (
    Build,
    Close,
    End,
    Message,
    SweepError,
    SweepOrder,
    SweepReply,
    not_finite,
    watched,
)
from flexgen_helm.distributed.neighbours import NotComputed, StageNeighbours
from flexgen_helm.errors import StageLost
from flexgen_helm.execution.interfaces import Executor
from flexgen_helm.generation.replies import Reply, replies
from flexgen_helm.runtime.building import Parts
from flexgen_helm.runtime.pipeline.make import make_parts
from flexgen_helm.runtime.pipeline.pipe import COMPUTED
from flexgen_helm.runtime.precise_products import PRECISE_PRODUCTS
from flexgen_helm.schedule.rows import LogitRequest

logger = logging.getLogger(__name__)


def follow(group: StageGroup) -> None:
    """Do what the first stage says until it ends this stage.

    Raises:
        StageLost: If another stage is lost.
    """
    message = group.next_message()
    while not isinstance(message, End):
        if isinstance(message, Build):
            message = _follow_engine(group, message)
        if not isinstance(message, End):
            message = group.next_message()


def _follow_engine(group: StageGroup, build: Build) -> Message:
    """Make a part of an engine and compute with it until it is closed; returns what ended it.

    The first stage hears of it if it cannot be made.
    """
    group.begin_epoch()
    try:
        parts = make_parts(group, build.arguments)
    except StageLost:
        raise
    except Exception as error:
        logger.info("this stage's part of the engine was not made: %s: %s", type(error).__name__, error)
        group.fail(error)
        return Close()
    try:
        with parts.device.current(), PRECISE_PRODUCTS.hold():
            follower = _Follower(group, parts)
            message = follower.serve()
            follower.close()
            return message
    finally:
        group.on_message, group.before_end = lambda message: None, lambda: None
        parts.executor.close()
        parts.held.close()


class _Follower:
    """Computes ordered sweeps."""

    def __init__(self, group: StageGroup, parts: Parts) -> None:
        assert parts.neighbours is not None
        self._group = group
        self._executor: Executor = parts.executor
        self._neighbours: StageNeighbours = parts.neighbours
        self._leaving: deque[tuple[int, list[Delivery]]] = deque()
        self._seconds, self._sweeps = 0.0, 0

    def serve(self) -> Message:
        """Compute what is ordered until the engine is closed or this stage is to end; returns that message."""
        while not isinstance(message := self._group.next_message(), Close | End):
            if isinstance(message, SweepOrder):
                self._compute(message)
        return message

    def close(self) -> None:
        """Part from the stages before and behind."""
        self._neighbours.close()
        logger.info(
            COMPUTED, self._group.name(self._group.index), self._seconds - self._neighbours.waited_seconds, self._sweeps
        )

    def _compute(self, order: SweepOrder) -> None:
        watched(order.rows)
        while self._leaving and self._leaving[0][0] <= order.answered:
            self._group.wait_for(self._leaving.popleft()[1])
        self._neighbours.begin_sweep(order.number, order.rows, delivered=order.answered)
        questions, found = iter(order.questions), list[Reply]()

        def answer(logit_requests: list[LogitRequest], logits: Tensor) -> None:
            found.extend(replies(list(islice(questions, len(logit_requests))), logits))

        begun = time.perf_counter()
        try:
            self._executor.run(order.sweep, answer)
            self._seconds, self._sweeps = self._seconds + time.perf_counter() - begun, self._sweeps + 1
            reply = SweepReply(order.number, tuple(found), tuple(not_finite(order.rows)))
        except Exception as error:
            self._neighbours.give_up(sends=not self._group.is_last)
            if not isinstance(error, NotComputed):
                logger.info("sweep %d failed here: %s: %s", order.number, type(error).__name__, error)
                self._send(order.number, SweepError.of(order.number, self._group.index, error))
            reply = SweepReply(order.number, failed=True)
        if self._group.is_last:
            self._send(order.number, reply)

    def _send(self, number: int, message: SweepReply | SweepError) -> None:
        self._leaving.append((number, self._group.send(message, 0)))
