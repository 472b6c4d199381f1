"""How large the things are that are measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """Sizes of OPT-30B in 16 bits, whose decode rows attend on the CPU."""

    device: str = "cuda"
    width: int = 7168
    num_heads: int = 56
    head_dim: int = 128
    num_sequences: int = 80
    """Sequences whose K and V attention reads."""
    num_chunks: int = 5
    """Chunks of 128 tokens of each."""
    layer_bytes: int = 1176 * MIB
    small_bytes: int = MIB
    piece_bytes: tuple[int, ...] = (16 * MIB, 32 * MIB)
    batches: tuple[int, ...] = (1, 2, 3, 5, 8, 13, 32, 64)
    """Batch counts of attention's products."""
    queries: tuple[int, ...] = (16, 32, 48, 80, 128, 256)
    """Queries of a chunk in attention's products."""
    tokens: tuple[int, ...] = (16, 40, 64, 256, 1000, 4096)
    """Tokens that meet a linear layer at a time."""
    rounds: int = 5
    kernel_heads: tuple[tuple[int, int, int], ...] = ((56, 56, 128), (32, 8, 128), (16, 8, 256))
    """Query heads, K/V heads and head size of OPT-30B, Llama 3.1 8B and Gemma 2 9B."""
    kernel_lengths: tuple[int, ...] = (1024, 1024, 1024, 1024)
    """Tokens of the sequences with which the kernel is timed."""
    kernel_dtype: torch.dtype = torch.bfloat16
    bench: tuple[str, ...] = ("--model", "facebook/opt-30b", "--dtype", "bfloat16", "--max-memory", "device=15GiB")
    generation: tuple[str, ...] = ("--prompt-len", "512", "--gen-len", "32", "--num-prompts", "80")
    scoring: tuple[str, ...] = ("--score", "--prompt-len", "700", "--num-prompts", "128")
    resident: tuple[str, ...] = (
        *("--model", "meta-llama/Llama-3.1-8B", "--dtype", "bfloat16", "--warm-up"),
        *("--prompt-len", "512", "--gen-len", "64", "--num-prompts", "64"),
    )
    cache_tiers: tuple[str, ...] = (
        *("--device", "cuda", "--model", "facebook/opt-1.3b", "--limit", "4GiB", "--prompts", "48", "--rounds", "1"),
        *("--batch", "64", "--batch-tokens", "4096"),
    )
    pytest: tuple[str, ...] = ("-v",)

    @property
    def torch_device(self) -> torch.device:
        """The device."""
        return torch.device(self.device)


TINY = Sizes(
    device="cpu",
    width=64,
    num_heads=4,
    head_dim=16,
    num_sequences=3,
    layer_bytes=3 * MIB,
    small_bytes=MIB // 16,
    piece_bytes=(MIB,),
    batches=(1, 3),
    queries=(16, 32),
    tokens=(16, 40),
    rounds=1,
    kernel_heads=((2, 1, 16),),
    kernel_lengths=(40, 20),
    kernel_dtype=torch.float16,  # Triton's interpreter does not compute in bfloat16
    bench=("--model", "facebook/opt-125m", "--device", "cpu"),
    generation=("--prompt-len", "8", "--gen-len", "2", "--num-prompts", "2"),
    scoring=("--score", "--prompt-len", "8", "--num-prompts", "2"),
    resident=("--model", "facebook/opt-125m", "--device", "cpu", "--prompt-len", "8", "--gen-len", "2", "--num-prompts", "2"),
    cache_tiers=(
        *("--tier", "disk", "--dtype", "float32", "--limit", "24MiB", "--prompts", "3", "--prompt-len", "300"),
        *("--new-tokens", "3", "--rounds", "1", "--variants", "16", "kv4"),
    ),
    pytest=("-q", "--collect-only"),
)
"""For a try on a CPU, which shows that everything runs and nothing else."""
