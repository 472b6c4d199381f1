"""What a harness and one of its backends offer to `measure.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What an evaluation of some questions gave."""

    score: float
    """Share of right answers."""
    answers: list[Any]
    """Of each question: log-probabilities of its choices, or the text of the answer."""


Way = Callable[[int], Outcome]
"""Evaluates the first questions, as many as it is told, with a loaded model."""
