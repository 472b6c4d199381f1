"""The three levels of exactness for every family: same rows, any packing, and against plain ``transformers``.

A: the order of computation changes no bit. B: no packing of jobs changes a bit of an answer. C: answers are those of
``transformers`` one at a time, within the tolerances of ``tests.reference``.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
from _pytest.mark import ParameterSet
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flexgen_helm import Job, Policy
from flexgen_helm.rows.choice import KindChoice
from tests.jobs import fixed_mix, job_mixes, random_tokens
from tests.models import ENDING, FAMILIES, SINGLE
from tests.reference import Agreement
from tests.workbench import NARROW, POLICY, Workbench

MECHANISMS = ("falcon", "mpt", "falcon_h1", "lfm2", "qwen3_5_text")
"""Families of single rows that show: own rotary attention, ALiBi, attention beside a state space in six layers, convolutions,
delta rules."""
KINDS = ("llama", "opt", "gemma2", "gpt_oss", "llama4_text", "mixtral", "deepseek_v3", *MECHANISMS)
"""One family of each mechanism: in packed rows grouped heads, learned positions, softcaps, sinks, chunks, experts and latent
attention."""
SCHEDULES = ("llama", "opt", "gpt_oss", "mixtral", "qwen3_5_text")
"""Of these, the ones that the schedule treats differently."""


def slow_but(fast: Iterable[str], families: Iterable[str]) -> list[ParameterSet]:
    """Families, of which those are slow that show no mechanism of their own."""
    return [pytest.param(family, marks=() if family in fast else pytest.mark.slow) for family in families]


SINGLE_ROWS = slow_but(MECHANISMS, SINGLE)
SERVED = slow_but(KINDS, (*FAMILIES, *SINGLE))
ONE_OF_A_KIND = slow_but(SCHEDULES, (*FAMILIES, *SINGLE))
"""What decides here is the schedule and the mechanism; numbers of every family are compared elsewhere in this file."""
LONG_FAMILIES = slow_but(
    ("llama", "gpt_oss", "deepseek_v3", "qwen3_5_text"),
    ("llama", "opt", "gemma2", "gpt_oss", "deepseek_v3", "mpt", "falcon_h1", "qwen3_5_text"),
)
"""Grouped heads, learned positions, softcap, sinks and latent attention, over several key splits; states over several chunks of
their scans."""
ROW_SIZES = [(8, 48), (32, 20)]

few_examples = settings(
    max_examples=3,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
many_examples = settings(few_examples, max_examples=60, phases=[Phase.generate, Phase.shrink])


def assert_level_c(
    bench: Workbench, family: str, jobs: list[Job], *, policy: Policy = POLICY, rows: KindChoice = "auto"
) -> Agreement:
    """Runs the jobs together and compares each with the reference."""
    agreement = Agreement()
    for job, result in zip(jobs, bench.engine(family, policy=policy, rows=rows).run(jobs), strict=True):
        agreement.add(job, result, bench.reference(family))
    print(f"{family}: {agreement}")
    assert not agreement.failures, agreement.failures
    return agreement


@pytest.mark.parametrize("family", FAMILIES)
@few_examples
@given(jobs=job_mixes())
def test_level_c(bench: Workbench, family: str, jobs: list[Job]) -> None:
    assert_level_c(bench, family, jobs)


@pytest.mark.parametrize("family", SINGLE_ROWS)
def test_level_c_in_single_rows(bench: Workbench, family: str) -> None:
    assert assert_level_c(bench, family, fixed_mix(19, 12)).tokens > 30
    assert bench.engine(family).rows == "single"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_level_c_where_single_rows_are_forced(bench: Workbench, family: str) -> None:
    assert assert_level_c(bench, family, fixed_mix(19, 12), rows="single").tokens > 30
    assert bench.engine(family, rows="single").rows == "single"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@many_examples
@given(jobs=job_mixes(max_jobs=24))
def test_level_c_broadly(bench: Workbench, family: str, jobs: list[Job]) -> None:
    assert_level_c(bench, family, jobs, policy=NARROW)


@pytest.mark.slow
@pytest.mark.parametrize("family", SINGLE)
@settings(many_examples, max_examples=12)
@given(jobs=job_mixes(max_jobs=24))
def test_level_c_broadly_in_single_rows(bench: Workbench, family: str, jobs: list[Job]) -> None:
    assert_level_c(bench, family, jobs, policy=NARROW)


@pytest.mark.parametrize("family", ONE_OF_A_KIND)
def test_other_row_sizes_stay_within_level_c(bench: Workbench, family: str) -> None:
    """One pair of sizes for each family, in turn."""
    sizes = ROW_SIZES[[*FAMILIES, *SINGLE].index(family) % len(ROW_SIZES)]
    policy = Policy(gpu_batch_size=sizes[0], num_gpu_batches=2, gpu_batch_tokens=sizes[1], block_tokens=4096)
    assert assert_level_c(bench, family, fixed_mix(3, 12), policy=policy).tokens > 0


@pytest.mark.parametrize("family", ENDING)
def test_end_token_stops_a_completion(bench: Workbench, family: str) -> None:
    jobs = [replace(job, max_new_tokens=12) for job in fixed_mix(5, 16)]
    results = bench.engine(family).run(jobs)
    reasons = {completion.finish_reason for result in results for completion in result.completions}
    assert reasons == {"endoftext", "length"}
    assert_level_c(bench, family, jobs)


@pytest.mark.parametrize("family", ONE_OF_A_KIND)
def test_level_a_row_and_zigzag_order(bench: Workbench, family: str) -> None:
    jobs = fixed_mix(7, 20)
    assert bench.engine(family, order="row").run(jobs) == bench.engine(family, order="zigzag").run(jobs)


@pytest.mark.parametrize("family", SERVED)
def test_level_b_neighbours_and_order(bench: Workbench, family: str) -> None:
    engine, jobs = bench.engine(family), fixed_mix(11, 20 if family in FAMILIES else 12)
    together = engine.run(jobs)
    for index in range(0, len(jobs), 4):
        assert engine.run([jobs[index]]) == [together[index]]
    order = random.Random(11).sample(range(len(jobs)), len(jobs))
    assert engine.run([jobs[index] for index in order]) == [together[index] for index in order]
    assert engine.run(jobs[:7]) + engine.run(jobs[7:]) == together
    assert engine.rows == ("packed" if family in FAMILIES else "single")


def assert_level_b(bench: Workbench, family: str, jobs: list[Job], shuffled: random.Random) -> None:
    """Runs the jobs together, in another order in a narrow block, and one of them alone."""
    together = bench.engine(family).run(jobs)
    order = shuffled.sample(range(len(jobs)), len(jobs))
    narrow = bench.engine(family, policy=NARROW).run([jobs[index] for index in order])
    assert narrow == [together[index] for index in order]
    alone = shuffled.randrange(len(jobs))
    assert bench.engine(family).run([jobs[alone]]) == [together[alone]]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(many_examples, max_examples=30)
@given(jobs=job_mixes(max_jobs=24), shuffled=st.randoms(use_true_random=False))
def test_level_b_broadly(bench: Workbench, family: str, jobs: list[Job], shuffled: random.Random) -> None:
    assert_level_b(bench, family, jobs, shuffled)


@pytest.mark.slow
@pytest.mark.parametrize("family", SINGLE)
@settings(many_examples, max_examples=12)
@given(jobs=job_mixes(max_jobs=24), shuffled=st.randoms(use_true_random=False))
def test_level_b_broadly_in_single_rows(bench: Workbench, family: str, jobs: list[Job], shuffled: random.Random) -> None:
    assert_level_b(bench, family, jobs, shuffled)


@pytest.mark.parametrize("family", ONE_OF_A_KIND)
def test_level_b_block_sizes(bench: Workbench, family: str) -> None:
    jobs = fixed_mix(13, 40 if family in FAMILIES else 20)
    assert bench.engine(family, policy=NARROW).run(jobs) == bench.engine(family).run(jobs)


@pytest.mark.parametrize("family", ONE_OF_A_KIND)
def test_level_b_shared_prefix(bench: Workbench, family: str) -> None:
    """Prompts that share 40 tokens, beside an unrelated long one, against each of them alone."""
    engine, prefix = bench.engine(family), random_tokens(1, 40)
    prompts = [prefix, *(prefix + random_tokens(seed, seed) for seed in range(2, 7)), random_tokens(9, 60)]
    jobs = [Job(token_ids=ids, max_new_tokens=6, score_prompt=True, top_logprobs=10) for ids in prompts]
    assert [engine.run([job])[0] for job in jobs] == engine.run(jobs)


@pytest.mark.parametrize("family", ONE_OF_A_KIND)
def test_level_b_other_fields_of_the_job(bench: Workbench, family: str) -> None:
    """What else a job asks for changes neither its tokens nor their log-probabilities."""
    engine, jobs = bench.engine(family), [replace(job, max_new_tokens=6) for job in fixed_mix(17, 8)]
    full = engine.run([replace(job, score_prompt=True) for job in jobs])
    bare = engine.run([replace(job, score_prompt=False, top_logprobs=0, max_new_tokens=3) for job in jobs])
    for a, b in zip(full, bare, strict=True):
        long, short = a.completions[0], b.completions[0]
        assert short.token_ids == long.token_ids[:3]
        assert short.logprobs == long.logprobs[:3]
        assert b.prompt_logprobs is None


@pytest.mark.parametrize("family", LONG_FAMILIES)
def test_long_prompts(bench: Workbench, family: str) -> None:
    """Prompts longer than a row and than one split of keys, behind a prefix that ends inside a page and a split."""
    prefix = random_tokens(21, 270)
    prompts = [prefix + random_tokens(22, 7), prefix + random_tokens(23, 250), random_tokens(24, 255), prefix[:256]]
    jobs = [Job(token_ids=ids, max_new_tokens=5, score_prompt=True, top_logprobs=10) for ids in prompts]
    assert_level_c(bench, family, jobs)
    engine = bench.engine(family)
    assert [engine.run([job])[0] for job in jobs] == engine.run(jobs)
