"""What a row costs in a layer that is neither the first nor the last: launches of kernels, copies, and waits for the device.

The bounds are sums of what the code needs for one row, so that a kernel or a wait that creeps in shows. The jobs are three
prompts of 100 tokens: one chunk of keys for each, one window, one group.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flexgen_helm import Job, Policy
from flexgen_helm.execution.sweep_run import SweepRun
from flexgen_helm.schedule.operations import Operation
from tests.jobs import random_tokens
from tests.models import save_tiny
from tests.simulated_gpu.engines import POLICY, answers
from tests.simulated_gpu.gpu import Event, SimulatedGpu
from tests.simulated_gpu.patches import simulated_gpu

JOBS = [Job(token_ids=random_tokens(seed, 100), max_new_tokens=3, ignore_eos=True) for seed in range(3)]
ROWS = replace(POLICY, gpu_batch_tokens=512, overlap=False)
NUM_LAYERS = 4
STEADY = (1, 2)
"""The first layer plans, the last one picks what the output head needs."""

LLAMA = 2 * 6 + 7 + 2 * 5 + 2 + 2
"""Two norms in six kernels (square, mean, epsilon, root, two products), seven linear layers, two rotations in five (two products,
half negated and put together, sum), activation and gate, two sums with the hidden state."""
MIXTRAL_EXPERTS = 4
"""Of the tiny model."""
KEEP = 13 + 2
"""K and V are looked through (magnitude and peak of both, two limits, and; not, or; two zeros and two choices) and written."""
WINDOW = 2 + 6 + 3
"""Room for outputs and its padding; a merge of one chunk (top, masked; difference, weights, product), its division."""
GATHER = 3 + 2
"""Indices of the pages' heads (range, product, sum), then K and V."""
ATTEND = 2 + 3 + 4 + 4
"""Two products with scale and mask, softmax in four steps, division, log-sum-exp; maxima without keys are masked."""
PUT = 2
"""Outputs and log-sum-exps go to their places."""
DECODE = KEEP + WINDOW + GATHER + (2 + ATTEND + 2) + PUT
"""Heads are padded to 16 rows (zeros, copy), and both results are made contiguous for the padding to be dropped."""
PREFILL = KEEP + 2 + WINDOW + GATHER + (1 + 1 + ATTEND + 4) + PUT
"""The pages of new sequences are zeroed; queries are picked and folded; both results are made contiguous and picked."""


class Cost(NamedTuple):
    """What one operation of one row asked of the device, in the thread that computes."""

    kind: str
    """Of the row."""
    operation: str
    j: int
    events: list[Event]

    def count(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.events)


class Counting:
    """Notes the costs of all operations."""

    def __init__(self, gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
        self._gpu, self._costs = gpu, list[Cost]()
        compute, move = SweepRun.compute, SweepRun.move
        noted = self._note

        def computing(run: SweepRun[Any], j: int, k: int, *, last: bool) -> None:
            with noted(run, Operation("compute", j, k)):
                compute(run, j, k, last=last)

        def moving(run: SweepRun[Any], operation: Operation) -> Any:
            with noted(run, operation):
                return move(run, operation)

        monkeypatch.setattr(SweepRun, "compute", computing)
        monkeypatch.setattr(SweepRun, "move", moving)
