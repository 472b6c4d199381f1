"""Tell how far fitting is: a line of the log at least every half minute."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds between two lines."""


class LayerProgress:
    """Counts layers of one pass."""

    def __init__(self, name: str, num_layers: int) -> None:
        """Nothing is done yet.

        Args:
            name: What the pass does, such as "statistics".
            num_layers: Number of layers.
        """
        self._name, self._num_layers = name, num_layers
        self._begun = self._told = time.monotonic()
        self._count = 0

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Say how long the pass took, if it is complete."""
        if error is None and self._count:
            logger.info("compression: %s of %s layers took %.0f s", self._name, self._count, time.monotonic() - self._begun)

    def done(self, j: int) -> None:
        """Count layer j."""
        self._count += 1
        now, left = time.monotonic(), self._num_layers - j - 1
        if now - self._told >= EVERY and left:
            self._told = now
            seconds = (now - self._begun) / self._count * left
            logger.info("compression: %s, layer %s of %s, about %.0f s left", self._name, j + 1, self._num_layers, seconds)
