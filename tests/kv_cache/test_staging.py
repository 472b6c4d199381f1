"""Buffers between host and device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from flexgen_helm.kv_cache.pages import NUM_BUFFERS
from flexgen_helm.kv_cache.staging import StagingBuffer, StagingRing
from flexgen_helm.memory.device import CPU, Device

OWN_MEMORY = Device(torch.device("cpu"), own_memory=True)


def failed(error: BaseException) -> Future[None]:
    future: Future[None] = Future()
    future.set_exception(error)
    return future


def opened(gate: threading.Event) -> Callable[[], None]:
    """Work that lasts until a gate is open."""

    def wait() -> None:
        assert gate.wait(10)

    return wait


def test_a_buffer_copies_its_beginning_to_its_twin_and_back() -> None:
    buffer = StagingBuffer(100, OWN_MEMORY)
    buffer.host.fill_(1)
    buffer.twin.fill_(2)
    buffer.to_device(60)
    assert buffer.twin[:100].tolist() == [1] * 60 + [2] * 40
    buffer.twin.fill_(3)
    buffer.to_host(30)
    assert buffer.host[:100].tolist() == [3] * 30 + [1] * 70


def test_where_the_device_uses_the_hosts_memory_there_is_one_buffer() -> None:
    buffer = StagingBuffer(100, CPU)
    assert buffer.twin is buffer.host
    buffer.host.fill_(7)
    buffer.to_device(50)
    assert buffer.twin.unique().tolist() == [7]


def test_buffers_come_in_turn() -> None:
    ring = StagingRing(OWN_MEMORY)
    first = [ring.next(100) for _ in range(NUM_BUFFERS)]
    assert len({id(buffer) for buffer in first}) == NUM_BUFFERS
    assert [ring.next(50) for _ in range(NUM_BUFFERS)] == first
    assert all(len(buffer.host) >= 100 for buffer in first)


def test_a_larger_size_replaces_the_buffers_once_nothing_is_on_its_way_in_them() -> None:
    ring = StagingRing(OWN_MEMORY)
    small = [ring.next(100) for _ in range(NUM_BUFFERS)]
    gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        small[1].futures.append(pool.submit(opened(gate)))
        threading.Timer(0.05, gate.set).start()
        large = ring.next(100_000)
        assert gate.is_set()
    assert len(large.host) >= 100_000
    assert large not in small
    assert not small[1].futures


def test_a_buffer_comes_again_once_nothing_is_on_its_way_in_it() -> None:
    ring = StagingRing(OWN_MEMORY)
    buffer = ring.next(100)
    gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        buffer.futures.append(pool.submit(opened(gate)))
        threading.Timer(0.05, gate.set).start()
        for _ in range(NUM_BUFFERS - 1):
            ring.next(100)
        assert not gate.is_set()
        assert ring.next(100) is buffer
        assert gate.is_set()


def test_finish_raises_what_went_wrong_and_only_once() -> None:
    ring = StagingRing(OWN_MEMORY)
    ring.next(100)
    ring.next(100).futures.append(failed(OSError("torn")))
    with pytest.raises(OSError, match="torn"):
        ring.finish()
    ring.finish()


def test_abandon_waits_and_raises_nothing() -> None:
    ring = StagingRing(OWN_MEMORY)
    gate, done = threading.Event(), []
    with ThreadPoolExecutor(1) as pool:
        ring.next(100).futures.append(failed(OSError("torn")))
        ring.next(100).futures.append(pool.submit(lambda: done.append(gate.wait(10))))
        threading.Timer(0.05, gate.set).start()
        ring.abandon()
        assert done == [True]
    ring.finish()
