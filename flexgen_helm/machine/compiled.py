"""Compilation of loops by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

size = np.uint64
"""Type of indices: Numba lets signed ones count from the end, which keeps loops from being vectorised."""


def compiled(function: Any) -> Any:
    """Compile at the first call without the GIL, and keep the machine code on disk where a folder can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)
