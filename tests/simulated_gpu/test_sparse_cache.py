"""Sparse attention on the simulated GPU with the cache elsewhere: nothing unordered, bits of all on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_helm import Job, Policy
from flexgen_helm.types import Shares
from tests.jobs import random_tokens
from tests.simulated_gpu.engines import POLICY, THIRDS, answers
from tests.simulated_gpu.patches import simulated_gpu
from tests.simulated_gpu.test_placements import assert_close

pytestmark = pytest.mark.usefixtures("one_check")
STEM = random_tokens(7, 140)
JOBS = [
    Job(token_ids=STEM, max_new_tokens=20, ignore_eos=True),
    Job(token_ids=[*STEM, 5, 6], max_new_tokens=3, ignore_eos=True),
    Job(token_ids=random_tokens(8, 270), max_new_tokens=4, ignore_eos=True),
    Job(token_ids=[*STEM, *random_tokens(9, 40)], score_prompt=True),
]
"""Prompts that share a sealed chunk, in rows of both kinds."""
CACHES: list[Shares] = [(0, 1, 0), (0, 0, 1), THIRDS]


def policy(cache: Shares, *, cpu_attention: float = 0, overlap: bool = True) -> Policy:
    """Prompts come in while others decode."""
    return replace(POLICY, cache=cache, cpu_attention=cpu_attention, overlap=overlap, block_tokens=256)


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("overlap", [True, False])
def test_answers_are_those_of_a_cache_on_the_device(folder_of: Callable[[str], Path], cache: Shares, overlap: bool) -> None:
    with simulated_gpu() as gpu:
        expected = answers(folder_of("llama"), policy((1, 0, 0)), JOBS, compression="kv4s10")
        found = answers(folder_of("llama"), policy(cache, overlap=overlap), JOBS, compression="kv4s10")
    assert not gpu.faults, "\n".join(gpu.faults)
    assert found == expected


def test_the_cpu_attends_beside_the_device(folder_of: Callable[[str], Path]) -> None:
    """Means are where the CPU reads them, and prompts on the device read the same."""
    on_cpu = answers(folder_of("llama"), policy((1, 0, 0)), JOBS, compression="s60", device="cpu")
    with simulated_gpu() as gpu:
        found = answers(folder_of("llama"), policy((0, 1, 0), cpu_attention=1), JOBS, compression="s60")
    assert not gpu.faults, "\n".join(gpu.faults)
    assert_close(found, on_cpu)
