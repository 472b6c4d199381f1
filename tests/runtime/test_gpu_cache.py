"""Compressed K/V and sparse attention on a CUDA device: bits that depend on no placement, close to those of the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_helm import Engine, Job, Policy
from tests.jobs import random_tokens
from tests.models import save_tiny

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
POLICY = Policy(gpu_batch_size=16, num_gpu_batches=2, gpu_batch_tokens=64)


@pytest.mark.parametrize("variant", ["kv4s10", "kv4", "k8v2", "s10", "kv4s10-flexgen"])
def test_placement_changes_no_bit_of_compressed_caches(variant: str, tmp_path: Path) -> None:
    folder, stem = str(save_tiny("llama", tmp_path, num_layers=3)), random_tokens(1, 200)
    jobs = [
        Job(token_ids=stem + random_tokens(2, 60), score_prompt=True),
        Job(token_ids=stem[:140] + random_tokens(3, 9), max_new_tokens=20, ignore_eos=True),
        Job(token_ids=stem, max_new_tokens=12, ignore_eos=True),
    ]
    with Engine.from_pretrained(folder, device="cuda", policy=POLICY, compression=variant) as engine:
        expected = engine.run(jobs)
    thirds = (0.2, 0.4, 0.4)
    policy = replace(POLICY, weights=thirds, cache=thirds, cpu_attention=0)
    with Engine.from_pretrained(
        folder, device="cuda", policy=policy, compression=variant, offload_folder=tmp_path / "offload"
    ) as engine:
        assert engine.run(jobs) == expected
        assert engine.run(jobs[1:]) == expected[1:]
    with Engine.from_pretrained(folder, device="cpu", policy=POLICY, compression=variant) as engine:
        scored = engine.run(jobs[:1])[0].prompt_logprobs
    found = expected[0].prompt_logprobs
    assert scored is not None
    assert found is not None
    assert found[:129] == pytest.approx(scored[:129], abs=3e-4)  # before anything is quantised, rounding is all that differs
    assert sum(found) == pytest.approx(sum(scored), rel=0.01)
