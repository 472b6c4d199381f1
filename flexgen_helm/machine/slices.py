"""How a weight is cut where its numbers are widened to float32. Needs no torch, since memory is planned with it."""

from __future__ import annotations

SCRATCH_BYTES = 4 * 2**20
"""Bytes of the buffer for a widened slice: it stays in a processor's cache, and a slice is worth the call of a product."""
SLICE_STEP = 16
"""Output features of a slice are a multiple of this, whatever their size."""
FLOAT32_BYTES = 4


def slice_features(num_inputs: int) -> int:
    """Return the output features of a slice, by the number of inputs alone, so that no bit depends on anything else."""
    fitting = SCRATCH_BYTES // (FLOAT32_BYTES * num_inputs)
    return max(SLICE_STEP, fitting // SLICE_STEP * SLICE_STEP)
