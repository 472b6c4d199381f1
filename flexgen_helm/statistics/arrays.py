"""What every statistic asks of its input: one value an instance, none of them missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Labels = Sequence[int] | Sequence[str] | NDArray[Any]
"""A label for each instance, ``[N]``; instances with equal labels depend on each other."""


def checked(name: str, values: ArrayLike) -> Floats:
    """Return values as float64 ``[N]``.

    Args:
        name: What the values are, for the message.
        values: Numbers or truth values, ``[N]``.

    Raises:
        ValueError: If they are not one row of at least one finite number.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"The values of {name} have the shape {list(array.shape)}; one value for each instance is needed.")
    if not len(array):
        raise ValueError(f"The values of {name} are empty; there is no statistic of nothing.")
    if missing := int((~np.isfinite(array)).sum()):
        raise ValueError(
            f"{missing} of {len(array)} values of {name} are NaN or infinite. Leave these instances out, on both sides."
        )
    return array


def checked_pairs(before: ArrayLike, after: ArrayLike) -> tuple[Floats, Floats]:
    """Return both sides of ``N`` pairs as float64 ``[N]``.

    Raises:
        ValueError: As in `checked`, and if one side has more values.
    """
    first, second = checked("before", before), checked("after", after)
    if len(first) != len(second):
        raise ValueError(f"There are {len(first)} values before and {len(second)} after; each must have its partner.")
    return first, second


def numbered(clusters: Labels | None, num: int) -> tuple[NDArray[np.intp], int]:
    """Number clusters from 0.

    Args:
        clusters: A label for each instance, ``[N]``; None: each instance is its own cluster.
        num: Number of instances ``N``.

    Returns:
        The number of each instance's cluster, ``[N]``, and how many clusters there are.

    Raises:
        ValueError: If there is not one label for each instance.
    """
    if clusters is None:
        return np.arange(num), num
    labels = np.asarray(clusters)
    if labels.shape != (num,):
        raise ValueError(f"The labels of clusters have the shape {list(labels.shape)} and there are {num} instances.")
    names, numbers = np.unique(labels, return_inverse=True)
    return numbers, len(names)
