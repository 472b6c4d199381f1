"""The loop that chooses which keys a query reads, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexgen_helm.machine.compiled import compiled


@compiled
def choose_rows(scores: Any, percent: int, chosen: Any) -> None:
    """Choose the largest scores of each row; of equal ones the first.

    Args:
        scores: fp32 ``[N, L]``, -inf for keys that are not there.
        percent: How many of the others, in a hundred, rounded up.
        chosen: fp32 ``[N, L]``: filled with 1 where a key is chosen, else 0.
    """
    present = np.empty(scores.shape[1], np.float32)
    for i in range(len(scores)):
        row, count = scores[i], 0
        for j in range(len(row)):
            if row[j] > -np.inf:
                present[count] = row[j]
                count += 1
        chosen[i] = 0
        if count == 0:
            continue
        wanted = (count * percent + 99) // 100
        least = np.partition(present[:count], count - wanted)[count - wanted]
        equal = wanted
        for j in range(len(row)):
            equal -= row[j] > least
        for j in range(len(row)):
            if row[j] > least:
                chosen[i, j] = 1
            elif row[j] == least and equal > 0:
                chosen[i, j] = 1
                equal -= 1
