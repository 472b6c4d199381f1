"""Compressed K/V in the engine: levels A and B, memory that is tight, and what is refused or told."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen_helm import Engine, Job, Policy, Result
from flexgen_helm.errors import PolicyError
from flexgen_helm.schedule.operations import Order
from tests.jobs import random_tokens
from tests.runtime.test_offload import POLICIES
from tests.workbench import NARROW, OWN_MEMORY, POLICY, Workbench

FAMILIES = ["llama", "opt", "mistral", "mixtral"]
"""A plain one, one with learned positions, one with sliding windows, a mixture of experts."""


def branching_jobs(seed: int) -> list[Job]:
    """Scored and generating prompts that part from two stems inside a chunk, inside a page, and at their borders."""
    chance = random.Random(seed)
    stems = [random_tokens(seed, 300), random_tokens(seed + 1, 170)]
    jobs = []
    for stem, cut in ((0, 128), (0, 140), (0, 160), (0, 290), (1, 32), (1, 129), (1, 170)):
        tokens = stems[stem][:cut] + random_tokens(chance.randrange(10**6), chance.choice([1, 5, 40, 150]))
        if chance.random() < 0.5:
            jobs.append(Job(token_ids=tokens, score_prompt=True))
        else:
            jobs.append(Job(token_ids=tokens, max_new_tokens=chance.choice([1, 20, 140]), ignore_eos=True))
    return jobs


def run(folder: Path, jobs: list[Job], compression: str, policy: Policy = POLICY, **options: Any) -> list[Result]:
    options = {"device": "cpu", "rows": "packed", **options}
    with Engine.from_pretrained(str(folder), compression=compression, policy=policy, **options) as engine:
        return engine.run(jobs)


CASES = [*((family, "kv4") for family in FAMILIES), ("llama", "kv4s10"), ("mistral", "s10"), ("opt", "kv4s10-flexgen")]
Answers = dict[tuple[str, str], list[Result]]


@pytest.fixture(scope="module")
def answers(bench: Workbench) -> Answers:
    """Answers of resident engines, the jobs of one block together."""
    return {(family, variant): run(bench.folder(family), branching_jobs(1), variant) for family, variant in CASES}


@pytest.mark.parametrize("case", CASES)
def test_each_job_alone_gets_the_same_bits(bench: Workbench, answers: Answers, case: tuple[str, str]) -> None:
    with Engine.from_pretrained(
        str(bench.folder(case[0])), compression=case[1], policy=POLICY, device="cpu", rows="packed"
    ) as engine:
        assert [engine.run([job])[0] for job in branching_jobs(1)] == answers[case]


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_in_another_order_and_smaller_blocks_gets_the_same_bits(
    bench: Workbench, answers: Answers, case: tuple[str, str]
) -> None:
    """Two jobs were answered before; blocks of 96 tokens cut prompts inside pages and chunks."""
    assert run(bench.folder(case[0]), branching_jobs(1)[:1:-1], case[1], NARROW) == answers[case][:1:-1]


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ("kv4", ("kv4", 1.0, 4 + 32 / 32, 4 + 32 / 16)),
        ("k8v2", ("k8v2-cut", 1.0, 8 + 32 / 32, 2 + 32 / 16)),
        ("s10", ("plain", 0.1, 32, 32 + 32 / 32)),
        ("kv4-flexgen", ("kv4-flexgen", 1.0, 4 + 32 / 16, 4 + 32 / 16)),
    ],
)
def test_the_engine_tells_its_bits(bench: Workbench, variant: str, told: tuple[str, float, float, float]) -> None:
    """Two numbers of 16 bits for the 32 tokens of a channel, or the 16 numbers of a token; a mean of 32 bits for 32 tokens."""
    with Engine.from_pretrained(str(bench.folder("llama")), compression=variant, policy=POLICY, device="cpu") as engine:
        info = engine.describe()
    assert (info.numerics.cache.format, info.numerics.cache.sparsity) == told[:2]
    assert (info.bits_per_k_element, info.bits_per_v_element) == told[2:]
    assert info.bits_per_cache_element == pytest.approx((told[2] + told[3]) / 2)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(CASES), POLICIES, st.sampled_from(["zigzag", "zigzag", "row"]))
def test_placement_changes_no_bit(
    bench: Workbench, answers: Answers, tmp_path: Path, case: tuple[str, str], policy: Policy, order: Order
) -> None:
    if "flexgen" in case[1]:
        policy = replace(policy, cpu_attention=0.0)
    options = {"order": order, "device": OWN_MEMORY, "offload_folder": tmp_path / case[0]}
    assert run(bench.folder(case[0]), branching_jobs(1), case[1], policy, **options) == answers[case]


@pytest.mark.parametrize("case", [("mistral", "s10"), ("llama", "kv4s10")])
def test_sparse_attention_on_the_cpu_beside_a_device_has_the_same_bits(
    bench: Workbench, answers: Answers, case: tuple[str, str]
) -> None:
    policy = replace(POLICY, cpu_attention=1.0, cache=(0.0, 1.0, 0.0))
    with Engine.from_pretrained(
        str(bench.folder(case[0])), compression=case[1], policy=policy, device=OWN_MEMORY, rows="packed"
    ) as engine:
        assert engine.run(branching_jobs(1)) == answers[case]
        assert engine.stats.bytes_moved["cpu_attention"] > 0


def test_flexgen_s_rules_on_the_cpu_beside_a_device_are_refused(bench: Workbench) -> None:
    policy = replace(POLICY, cpu_attention=1.0, cache=(0.0, 1.0, 0.0))
    for variant in ("s10-flexgen", "kv4-flexgen"):
        with pytest.raises(PolicyError, match=r"on the device only\. Leave cpu_attention out, .* without `-flexgen`"):
            run(bench.folder("llama"), [], variant, policy, device=OWN_MEMORY)


def test_more_bits_come_closer_to_the_uncompressed_answers(bench: Workbench) -> None:
    jobs = [Job(token_ids=random_tokens(3, 380), score_prompt=True)]
    exact = bench.engine("llama").run(jobs)[0].prompt_logprobs
    assert exact is not None
    errors = []
    for variant in ("kv2", "kv4", "kv8"):
        found = run(bench.folder("llama"), jobs, variant)[0].prompt_logprobs
        assert found is not None
        assert found[:129] == exact[:129]  # tokens of the first chunk meet nothing that is sealed
        errors.append(sum(abs(a - b) for a, b in zip(found, exact, strict=True)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_keys_and_values_have_bits_of_their_own(bench: Workbench) -> None:
    jobs = [Job(token_ids=random_tokens(3, 300), score_prompt=True)]
    found = [run(bench.folder("llama"), jobs, variant) for variant in ("kv4", "k4", "v4", "k4v2", "k2v4")]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_memory_for_few_sequences_gives_the_same_bits(bench: Workbench, tmp_path: Path) -> None:
    """Three tiers of which each holds a part of two sequences; buffers take 48 MiB of the device."""
    jobs = [Job(token_ids=random_tokens(i, 200), max_new_tokens=30, ignore_eos=True) for i in range(6)]
    plenty = run(bench.folder("llama"), jobs, "kv4")
    policy = Policy(gpu_batch_size=16, num_gpu_batches=1, gpu_batch_tokens=32, block_tokens=64, cache=(0.4, 0.3, 0.3))
    tight = run(
        bench.folder("llama"), jobs, "kv4", policy, device=OWN_MEMORY, offload_folder=tmp_path, max_memory={"device": "57MiB"}
    )
    assert tight == plenty


def test_single_rows_refuse_compressed_caches_by_name(bench: Workbench) -> None:
    with pytest.raises(PolicyError, match=r"runs in single rows, .* so that K and V cannot be compressed\. Name a variant"):
        Engine.from_pretrained(str(bench.folder("llama")), compression="kv4", policy=POLICY, device="cpu", rows="single")
