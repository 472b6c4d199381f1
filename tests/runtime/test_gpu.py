"""The same code on a CUDA device: levels A and B by a bit, level C against the CPU reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexgen_helm import Engine, Policy
from flexgen_helm.runtime.checks import Verdict
from tests.jobs import fixed_mix
from tests.models import save_tiny
from tests.reference import Agreement, Reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]
POLICY = Policy(gpu_batch_size=16, num_gpu_batches=2, gpu_batch_tokens=64)


@pytest.mark.parametrize("family", ["llama", "opt", "mistral", "gemma2", "gpt_oss"])
def test_a_gpu_gives_the_answers_of_the_reference(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path)
    jobs, agreement = fixed_mix(3, 12), Agreement()
    with Engine.from_pretrained(str(folder), dtype="float32", device="cuda", policy=POLICY) as engine:
        assert isinstance(engine.verdict, Verdict)
        together = engine.run(jobs)
        alone = [engine.run([job])[0] for job in jobs] if engine.verdict.bit_stable else together
        assert engine.stats.peak_bytes > 0
    reference = Reference(folder)
    for job, result in zip(jobs, together, strict=True):
        agreement.add(job, result, reference)
    assert not agreement.failures, agreement.failures
    assert alone == together
