"""Scattered reads: what is wanted arrives, and only the blocks that hold it are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen_helm.memory.block_reader import BlockReader
from flexgen_helm.memory.direct_io import DirectFile, DiskIO

BLOCK, NUM_BLOCKS = 4096, 24


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, NUM_BLOCKS * BLOCK // 12 - 800), min_size=1, max_size=60), st.sampled_from([12, 64, 4096, 9000]))
def test_stretches_arrive_and_only_their_blocks_are_read(tmp_path: Path, places: set[int], length: int) -> None:
    content = np.random.default_rng(0).integers(0, 256, NUM_BLOCKS * BLOCK, np.uint8)
    path = tmp_path / "file"
    path.write_bytes(content.tobytes())
    begins = [12 * place for place in sorted(places)]
    blocks = {block for begin in begins for block in range(begin // BLOCK, (begin + length - 1) // BLOCK + 1)}
    file, io = DirectFile(path), DiskIO()
    try:
        out = torch.zeros(len(begins), length, dtype=torch.uint8)
        read = BlockReader(file, io, num_bytes=NUM_BLOCKS * BLOCK).read(torch.tensor(begins), out)
        small = torch.zeros_like(out)
        in_parts = BlockReader(file, io, num_bytes=2 * BLOCK).read(torch.tensor(begins), small)
    finally:
        io.close()
        file.close()
    assert out.numpy().tobytes() == small.numpy().tobytes() == b"".join(content[b : b + length].tobytes() for b in begins)
    assert read == BLOCK * len(blocks) <= in_parts  # a block at a border of two parts is read for both
