"""The loop that chooses which keys the queries of a row read, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexgen_helm.attention.selection import NEG_INF, PAGE, above, choose_largest, num_ones
from flexgen_helm.machine.compiled import compiled, size


@compiled
def choose_table(scores: Any, percent: int, chosen: Any) -> None:
    """Choose the keys with the largest scores for each query and head; of equal ones the first.

    Args:
        scores: fp32 ``[T, C, H, 128]``, -inf for keys that are not there.
        percent: How many of the others, in a hundred, rounded up.
        chosen: bool ``[T, C, H, 128]``: filled: whether a key is chosen.
    """
    num_chunks, num_keys = size(scores.shape[1]), size(scores.shape[3])
    row = np.empty(scores.shape[1] * scores.shape[3], np.float32)
    bits = np.empty(len(row) // 32, np.uint32)
    for t in range(scores.shape[0]):
        for h in range(scores.shape[2]):
            for c in range(num_chunks):
                row[c * num_keys : (c + size(1)) * num_keys] = scores[t, c, h]
            count = np.int64(0)
            for i in range(size(len(bits))):
                count += np.int64(num_ones(above(row, PAGE * i, NEG_INF)))
            choose_largest(row, (count * percent + 99) // 100, bits)
            for c in range(num_chunks):
                for i in range(num_keys):
                    word = bits[(c * num_keys + i) // PAGE]
                    chosen[t, c, h, i] = (word >> np.uint32(i % PAGE)) & np.uint32(1)
