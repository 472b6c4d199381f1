"""Host threads: each has a mode of its own, and learns what another one did from what that one hands over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from tests.simulated_gpu.dispatch import GpuMode
from tests.simulated_gpu.gpu import SimulatedGpu


@contextmanager
def on_gpu(gpu: SimulatedGpu) -> Iterator[None]:
    """Let the operators of this thread reach the device."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # else ``torch.tensor(list, device="cuda")`` would not show as a copy
    try:
        with GpuMode(gpu):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


@contextmanager
def threads_patched(gpu: SimulatedGpu) -> Iterator[None]:
    """Let threads that start from here on use the device; starting, joining, submitting and futures hand knowledge over."""
    with ExitStack() as stack:
        for owner, changes in (
            (threading.Thread, _of_thread(gpu)),
            (Future, _of_future(gpu)),
            (ThreadPoolExecutor, _of_pool(gpu)),
        ):
            for name, make in changes.items():
                stack.enter_context(patch.object(owner, name, make(getattr(owner, name))))
        yield


Changes = dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]]
"""By name of a method, what makes the new one of the old one."""


def _of_thread(gpu: SimulatedGpu) -> Changes:
    def start(real: Callable[..., Any]) -> Callable[..., Any]:
        def method(thread: Any) -> None:
            thread._simulated_gpu_begin = dict(gpu.thread.known)
            real(thread)

        return method

    def run(real: Callable[..., Any]) -> Callable[..., Any]:
        def method(thread: Any) -> None:
            gpu.thread.learn(thread.__dict__.pop("_simulated_gpu_begin", {}))
            thread._simulated_gpu_agent = gpu.thread
            with on_gpu(gpu):
                real(thread)

        return method

    def join(real: Callable[..., Any]) -> Callable[..., Any]:
        def method(thread: Any, timeout: float | None = None) -> None:
            real(thread, timeout)
            if not thread.is_alive() and hasattr(thread, "_simulated_gpu_agent"):
                gpu.thread.learn(thread._simulated_gpu_agent.known)

        return method

    return {"start": start, "run": run, "join": join}


def _of_future(gpu: SimulatedGpu) -> Changes:
    def setting(real: Callable[..., Any]) -> Callable[..., Any]:
        def method(future: Any, value: Any) -> None:
            future._simulated_gpu_end = dict(gpu.thread.known)
            real(future, value)

        return method

    def getting(real: Callable[..., Any]) -> Callable[..., Any]:
        def method(future: Any, timeout: float | None = None) -> Any:
            try:
                return real(future, timeout)
            finally:
                gpu.thread.learn(getattr(future, "_simulated_gpu_end", {}))

        return method

    return {"set_result": setting, "set_exception": setting, "result": getting, "exception": getting}


def _of_pool(gpu: SimulatedGpu) -> Changes:
    def submit(real: Callable[..., Any]) -> Callable[..., Any]:
        def method(pool: Any, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            begin = dict(gpu.thread.known)

            def informed() -> Any:
                gpu.thread.learn(begin)
                return work(*args, **kwargs)

            return real(pool, informed)

        return method

    return {"submit": submit}
