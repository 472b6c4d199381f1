"""Precision of matrix products: torch's settings hold for a whole process, so they are fixed while an engine computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

Restore = Callable[[], None]
"""Function that sets what was set before."""
ROUNDED_SUMS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",  # since torch 2.7
)
"""Settings of `torch.backends.cuda.matmul` that let a GPU round the parts of a sum to 16 bits."""


class PreciseProducts:
    """Settings in which fp32 is multiplied in fp32, and parts of sums are added in fp32.

    They are no part of the numerics, so whatever a user sets for the process must change no bit. Engines that compute at the
    same time share them; the last one restores the user's.
    """

    def __init__(self) -> None:
        """Change nothing yet."""
        self._lock = threading.Lock()
        self._num_holders = 0
        self._restore: list[Restore] = []

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the settings for the body of a `with` statement."""
        with self._lock:
            if not self._num_holders:
                self._restore = [_fp32_in_fp32(), *(_sums_in_fp32(name) for name in ROUNDED_SUMS)]
            self._num_holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_holders -= 1
                if not self._num_holders:
                    for restore in self._restore:
                        restore()


PRECISE_PRODUCTS = PreciseProducts()
"""The settings of this process."""


def _fp32_in_fp32() -> Restore:
    """Multiply fp32 in fp32, on a CPU too, some of which can multiply it in bfloat16."""
    try:
        before = torch.get_float32_matmul_precision()
        restore: Restore = partial(torch.set_float32_matmul_precision, before)
    except RuntimeError:  # set by names that torch has since 2.9, of which this function knows nothing
        restore = _fp32_by_library()
    torch.set_float32_matmul_precision("highest")
    return restore


def _fp32_by_library() -> Restore:
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cuda.fp32_precision, cpu.fp32_precision

    def restore() -> None:
        cuda.fp32_precision, cpu.fp32_precision = before

    return restore


def _sums_in_fp32(name: str) -> Restore:
    settings = torch.backends.cuda.matmul
    before = getattr(settings, name, None)
    if before is None:
        return lambda: None
    split = getattr(settings, f"{name}_split_k", None)  # since torch 2.10; set together with the other

    def put(value: bool) -> None:
        setattr(settings, name, value if split is None else (value, split))

    put(False)
    return lambda: put(before)
