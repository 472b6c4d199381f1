"""A stage that ends while others wait for it: they hear which one it was, at once, and nothing hangs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from flexgen_helm import Engine, Job, Result
from flexgen_helm.errors import StageLost
from tests.distributed.stages import pipeline
from tests.jobs import random_tokens
from tests.models import save_tiny
from tests.workbench import NARROW

MOST_SECONDS = 30
"""In which a run must end."""


@pytest.mark.skipif(not hasattr(os, "kill"), reason="needs signals")
def test_a_killed_stage_ends_the_run_with_its_name(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    jobs = [Job(token_ids=random_tokens(seed, 50), max_new_tokens=40, ignore_eos=True) for seed in range(40)]
    jobs.insert(0, Job(token_ids=random_tokens(0, 5), max_new_tokens=1))
    killed: list[float] = []
    answered: list[int] = []
    with pipeline(2) as (other,), Engine.from_pretrained(str(folder), device="cpu", policy=NARROW) as engine:

        def kill(index: int, result: Result) -> None:
            answered.append(index)
            if not killed:
                other.kill()
                killed.append(time.monotonic())

        with pytest.raises(StageLost, match=r"stage 2 of 2 \(rank 1 on .*kept.*same command"):
            engine.run(jobs, on_result=kill)
        assert time.monotonic() - killed[0] < MOST_SECONDS
        assert 0 < len(answered) < len(jobs)
        with pytest.raises(StageLost, match="stage 2 of 2"):
            engine.run(jobs[:1])
