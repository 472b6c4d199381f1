"""What entropy-coded and losslessly coded weights take and how fast they are decoded: SmolLM2-135M's matrices.

Rates are weights a second of processor time of one core, the best of several rounds, in memory; then, by the clock on the wall,
of some threads. The weights are off the grid on which they were shipped (see `protocol`); their sensitivities
are those of random tokens.
Cost: about two minutes and 4 GiB of memory.

Command: ``python -m flexgen_helm.runs.quantizers.coding_rates --bits 4.5 --threads 2 --json result.json``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from flexgen_helm.compression.coding import Decoder, code_compressor, encode
from flexgen_helm.compression.entropy import Coded, bits
from flexgen_helm.compression.lossless import decode_planes, encode_planes
from flexgen_helm.compression.sensitivity import quantize, solve_steps
from flexgen_helm.runs.command_line import add_json, make_parser, prepare_libraries, reports_errors, write_json
from flexgen_helm.runs.quantizers.protocol import Subject

ROUNDS = 5
COMPRESSORS = {
    "codes only": code_compressor,
    "level 1": lambda: zstandard.ZstdCompressor(level=1, write_checksum=True),
    "level 3": lambda: zstandard.ZstdCompressor(level=3, write_checksum=True),
    "level -5": lambda: zstandard.ZstdCompressor(level=-5, write_checksum=True),
    "codes only, no checksum": lambda: zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6, window_log=17)
    ),
}


def rate(count: int, work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Return numbers a second, in units of 10**9."""
    best = float("inf")
    for _ in range(ROUNDS):
        begun = clock()
        work()
        best = min(best, clock() - begun)
    return count / best / 1e9


class Integers:
    """Matrices in frames of one of zstd's settings."""

    def __init__(self, coded: list[Coded], compressor: zstandard.ZstdCompressor) -> None:
        self.count = sum(x.integers.numel() for x in coded)
        begun = time.process_time()
        self.stored = [encode(x, compressor) for x in coded]
        self.encoded = self.count / (time.process_time() - begun) / 1e9
        self.targets = [torch.empty(x.integers.shape, dtype=torch.bfloat16) for x in coded]
        self.blocks = [(i, block) for i, x in enumerate(self.stored) for block in range(x.layout.num_blocks)]

    def decode(self) -> None:
        """Decode everything."""
        decoder = Decoder()
        for i, block in self.blocks:
            decoder.block(self.stored[i], block)

    def unpack(self, part: slice = slice(None)) -> None:
        """Decode and unpack a part of the blocks."""
        decoder = Decoder()
        for i, block in self.blocks[part]:
            decoder.unpack(self.stored[i], block, self.targets[i])

    def rates(self, threads: int) -> dict[str, float]:
        """Return bits a weight, and rates in units of 10**9 weights a second."""
        parts = [slice(i, None, threads) for i in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            together = rate(self.count, lambda: list(pool.map(self.unpack, parts)), time.perf_counter)
        return {
            "bits": sum(x.num_bytes for x in self.stored) * 8 / self.count,
            "encoded": self.encoded,
            "decoded": rate(self.count, self.decode),
            "unpacked": rate(self.count, self.unpack),
            "together": together,
        }


def measure_integers(coded: list[Coded], threads: int) -> dict[str, Any]:
    """Print a row for each of zstd's settings."""
    results = {}
    print(f"integers, {bits(coded):.4f} bits counted; G weights/s a core: encoded, decoded, and with unpacking to bf16")
    for name, compressor in COMPRESSORS.items():
        found = Integers(coded, compressor()).rates(threads)
        rates = "   ".join(f"{found[part]:.2f}" for part in ("encoded", "decoded", "unpacked"))
        print(f"  {name:24} {found['bits']:.4f} bits   {rates}   {threads} threads {found['together']:.2f}", flush=True)
        results[name] = found
    return results


def measure_planes(weights: Mapping[str, Tensor], dtype: torch.dtype, threads: int) -> dict[str, Any]:
    """Print a row for 16-bit weights."""
    memory = torch.cat([x.flatten().to(dtype) for x in weights.values()]).view(torch.uint8)
    count, target = memory.numel() // 2, torch.empty_like(memory)
    begun = time.process_time()
    planes = encode_planes(memory, dtype, torch.empty_like(memory))
    assert planes is not None
    encoded = count / (time.process_time() - begun) / 1e9
    num_frames = len(planes.sizes)
    decoded = rate(count, lambda: decode_planes(planes, range(num_frames), target))
    parts = [range(num_frames * i // threads, num_frames * (i + 1) // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        together = rate(
            count, lambda: list(pool.map(lambda part: decode_planes(planes, part, target), parts)), time.perf_counter
        )
    assert torch.equal(memory, target)
    taken = planes.memory.numel() * 8 / count
    print(
        f"  {dtype!s:24} {taken:.3f} bits, {16 / taken:.2f} times fewer bytes   {encoded:.2f}   {decoded:.2f}   "
        f"{threads} threads {together:.2f}",
        flush=True,
    )
    return {"bits": taken, "encoded": encoded, "decoded": decoded, "together": together}


def copied(memory: Tensor) -> float:
    """Return how fast this core copies, in 10**9 bytes a second, for comparison."""
    target = torch.empty_like(memory)
    return rate(memory.numel(), lambda: np.copyto(target.numpy(), memory.numpy()))


@reports_errors
def main() -> int:
    """Measure and print."""
    parser = make_parser("quantizers.coding_rates", __doc__)
    parser.add_argument("--bits", type=float, default=4.5, help="bits a weight")
    parser.add_argument("--threads", type=int, default=2, help="threads of the last column")
    add_json(parser)
    arguments = parser.parse_args()
    prepare_libraries(1)
    with torch.no_grad():
        subject = Subject(off_grid=True)
        weights, known = subject.weights, subject.sensitivities(subject.random_ids())
        rule = solve_steps(weights, known, arguments.bits)
        coded = [quantize(weight, known[name], rule, name=name) for name, weight in weights.items()]
        results: dict[str, Any] = {"integers": measure_integers(coded, arguments.threads)}
        print("16-bit weights, equal to the bit; G weights/s a core: encoded, decoded")
        for dtype in (torch.bfloat16, torch.float16):
            results[str(dtype)] = measure_planes(weights, dtype, arguments.threads)
        results["copied"] = copied(torch.empty(2**28, dtype=torch.uint8))
        print(f"  this core copies {results['copied']:.1f} GB/s")
    write_json(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
