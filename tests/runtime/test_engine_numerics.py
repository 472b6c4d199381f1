"""16-bit weights, the automatic dtype, and what belongs in a cache key."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.errors import PolicyError
from tests.dimensions import VOCAB_SIZE
from tests.jobs import fixed_mix, random_tokens
from tests.workbench import NARROW, POLICY, Workbench

FAMILY = "mistral"
BOTH_KINDS = [FAMILY, "qwen3_next"]
"""A family of packed rows and one of single rows."""
PROMPTS = [random_tokens(seed, 1 + 5 * seed) for seed in range(12)]


@pytest.mark.parametrize("family", BOTH_KINDS)
def test_bfloat16_answers_do_not_depend_on_order_or_packing(bench: Workbench, family: str) -> None:
    engine, jobs = bench.engine(family, dtype="bfloat16"), fixed_mix(95, 20)
    together = engine.run(jobs)
    assert bench.engine(family, dtype="bfloat16", order="row").run(jobs) == together
    assert bench.engine(family, dtype="bfloat16", policy=NARROW).run(jobs) == together
    assert [engine.run([job])[0] for job in jobs[::4]] == together[::4]
    assert engine.run(jobs[::-1]) == together[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_threads_with_rows_of_multiples_of_32(bench: Workbench, dtype: str) -> None:
    jobs, policy = fixed_mix(96, 20), Policy(gpu_batch_size=32, num_gpu_batches=2, gpu_batch_tokens=64)
    torch.set_num_threads(2)
    try:
        with Engine.from_pretrained(str(bench.folder("llama")), dtype=dtype, device="cpu", policy=policy) as engine:
            together = engine.run(jobs)
            assert [engine.run([job])[0] for job in jobs] == together
            assert engine.run(jobs[::-1]) == together[::-1]
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("family", BOTH_KINDS)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(bench: Workbench, family: str) -> None:
    """Mean Kullback-Leibler divergence over whole distributions, and agreement of the most likely token."""
    exact = torch.stack([bench.reference(family).log_probs(ids)[-1] for ids in PROMPTS])
    peer = torch.stack([bench.reference(family, dtype="bfloat16").log_probs(ids)[-1] for ids in PROMPTS])
    jobs = [Job(token_ids=ids, max_new_tokens=1, top_logprobs=VOCAB_SIZE) for ids in PROMPTS]
    ours = torch.empty_like(exact)
    for row, result in zip(ours, bench.engine(family, dtype="bfloat16").run(jobs), strict=True):
        candidates = result.completions[0].top_logprobs[0]
        row[[candidate.token_id for candidate in candidates]] = torch.tensor([c.logprob for c in candidates])
    assert torch.allclose(ours.exp().sum(-1), torch.ones(len(PROMPTS)), atol=1e-3)
    assert divergence(exact, ours) < 2 * divergence(exact, peer) + 1e-4
    # Divergences are quadratic in small errors: where the rounding errors of two have nothing in common, theirs add up.
    assert divergence(peer, ours) < divergence(exact, peer) + divergence(exact, ours)
    assert (ours.argmax(-1) == exact.argmax(-1)).float().mean() > 0.7


def divergence(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Mean over rows of the divergence of ``got`` from ``expected``, both log-probabilities, in nats."""
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def test_automatic_dtype_on_a_cpu_is_float32(bench: Workbench, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bench.folder(FAMILY), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    jobs = fixed_mix(97, 6)
    with Engine.from_pretrained(str(tmp_path), device="cpu", policy=POLICY) as automatic:
        answers, numerics = automatic.run(jobs), automatic.numerics
    with Engine.from_pretrained(str(tmp_path), dtype="float32", device="cpu", policy=POLICY) as named:
        assert named.run(jobs) == answers
        assert named.numerics == numerics


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"num_gpu_batches": 2}, True),
        ({"block_tokens": 512}, True),
        ({"gpu_batch_size": 32}, False),
        ({"gpu_batch_tokens": 64}, False),
    ],
)
def test_numerics_hold_row_sizes_and_no_placement(bench: Workbench, change: dict[str, Any], same: bool) -> None:
    policy: Policy = replace(POLICY, **change)
    changed = bench.engine("qwen2", policy=policy).numerics
    assert (changed == bench.engine("qwen2").numerics) is same


@pytest.mark.parametrize("threads", [1, 3])
def test_default_rows_are_whole_vectors_of_every_thread(bench: Workbench, threads: int) -> None:
    """Kernels split a row between threads, and give other bits in what is left of a vector of 16 floats."""
    torch.set_num_threads(threads)
    try:
        with Engine.from_pretrained(str(bench.folder("qwen2")), device="cpu") as engine:
            sizes = [engine.numerics.rows.gpu_batch_size, engine.numerics.rows.gpu_batch_tokens]
    finally:
        torch.set_num_threads(1)
    assert [size % (16 * threads) for size in sizes] == [0, 0]


def test_numerics_tell_weights_and_dtypes_apart(bench: Workbench) -> None:
    engines = [bench.engine("qwen2"), bench.engine("qwen2", dtype="bfloat16"), bench.engine("qwen3")]
    assert len({engine.numerics for engine in engines}) == 3


def test_the_dtype_of_the_cache_is_described(bench: Workbench) -> None:
    folder = str(bench.folder("qwen2"))
    with Engine.from_pretrained(folder, dtype="float32", device="cpu", policy=POLICY, kv_dtype="bfloat16") as engine:
        info = engine.describe()
    assert (info.bits_per_weight, info.bits_per_cache_element) == (32, 16)
    assert (info.bits_per_k_element, info.bits_per_v_element) == (16, 16)
    assert (info.numerics.weights.dtype, info.numerics.cache.dtype) == ("float32", "bfloat16")


def test_the_dtype_of_the_checkpoint_is_described_whatever_computes(bench: Workbench, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bench.folder("qwen2"), folder)
    config = json.loads((folder / "config.json").read_text())
    for dtype in ("bfloat16", None):
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        with Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY) as engine:
            assert engine.describe().released_dtype == (dtype or "")


def test_single_rows_have_no_dtype_of_their_own_for_the_cache(bench: Workbench) -> None:
    folder = str(bench.folder("qwen2"))
    with pytest.raises(PolicyError, match="kv_dtype cannot be set in single rows"):
        Engine.from_pretrained(folder, dtype="float32", device="cpu", policy=POLICY, rows="single", kv_dtype="bfloat16")
