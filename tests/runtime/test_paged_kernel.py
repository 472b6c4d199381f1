"""Engines whose prompts attend by the kernel for GPUs, run by Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.attention.paged.attention import attend_row
from flexgen_helm.rows import packed
from tests.jobs import random_tokens
from tests.runtime.test_compressed_cache import run
from tests.workbench import OWN_MEMORY, POLICY, Workbench

TIERS = Policy(gpu_batch_size=16, num_gpu_batches=1, gpu_batch_tokens=32, block_tokens=64, cache=(0.4, 0.3, 0.3))
RESIDENT = Policy(gpu_batch_size=16, num_gpu_batches=1, gpu_batch_tokens=32, block_tokens=64)


def jobs() -> list[Job]:
    stem = random_tokens(1, 100)
    scored = [Job(token_ids=stem + random_tokens(i, 50), score_prompt=True) for i in (2, 3)]
    return [*scored, Job(token_ids=random_tokens(4, 40), max_new_tokens=3, ignore_eos=True)]


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_kernel_for", lambda *_: attend_row)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant"), [("llama", "kv4"), ("opt", "w8"), ("mistral", "w8"), ("gemma2", "w8"), ("mixtral", "w8")]
)
def test_tiers_and_neighbours_change_no_bit(
    family: str, variant: str, bench: Workbench, tmp_path: Path, by_kernel: None
) -> None:
    folder = bench.folder(family)
    together = run(folder, jobs(), variant, RESIDENT)
    tiers = run(folder, jobs(), variant, TIERS, device=OWN_MEMORY, offload_folder=tmp_path)
    assert tiers == together
    with Engine.from_pretrained(str(folder), compression=variant, policy=RESIDENT, device="cpu", rows="packed") as engine:
        assert [engine.run([job])[0] for job in jobs()] == together


@pytest.mark.parametrize("family", ["mistral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_answers_are_those_of_attention_by_hand(family: str, bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(bench.folder(family))
    found = []
    for kernel in ("torch", "triton"):
        if kernel == "triton":
            monkeypatch.setattr(packed, "_kernel_for", lambda *_: attend_row)
        with Engine.from_pretrained(folder, dtype="float32", policy=POLICY, device="cpu", rows="packed") as engine:
            assert engine.numerics.machine.kernel == kernel
            found.append(engine.run(jobs()))
    for one, other in zip(*found, strict=True):
        assert [each.token_ids for each in one.completions] == [each.token_ids for each in other.completions]
        assert (one.prompt_logprobs or [])[1:] == pytest.approx((other.prompt_logprobs or [])[1:], abs=1e-5)
