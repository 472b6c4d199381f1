"""Engines on the simulated GPU, for its own tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.types import Result
from tests.jobs import fixed_mix

POLICY = Policy(gpu_batch_size=16, num_gpu_batches=2, gpu_batch_tokens=64)
THIRDS = (1 / 3, 1 / 3, 1 / 3)
MIXED = replace(POLICY, weights=THIRDS, cache=THIRDS, hidden=THIRDS, cpu_attention=0)
"""Everything on all three tiers, to which the device attends."""
ON_HOST = replace(POLICY, weights=(0.2, 0.8, 0), cache=(0, 1, 0), hidden=(0, 1, 0), cpu_attention=1)
"""Almost everything on the host, where rows attend that decode."""
JOBS = [replace(job, max_new_tokens=min(job.max_new_tokens, 4)) for job in fixed_mix(31, 6)]
NUM_LAYERS = 3
"""One for each tier."""


@contextmanager
def engine_for(folder: Path, policy: Policy, *, device: str = "cuda", **options: Any) -> Iterator[Engine]:
    """An engine with options that computes in one thread; nothing of it is left behind the context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        offload = folder.parent / "offload"
        with Engine.from_pretrained(str(folder), device=device, policy=policy, offload_folder=offload, **options) as engine:
            yield engine
        del engine
        gc.collect()  # tensors of the device live in circles too
    finally:
        torch.set_num_threads(threads)


def answers(folder: Path, policy: Policy, jobs: Sequence[Job] = JOBS, *, device: str = "cuda", **options: Any) -> list[Result]:
    """What an engine answers that is made for it."""
    with engine_for(folder, policy, device=device, **options) as engine:
        return engine.run(list(jobs), progress=False)
