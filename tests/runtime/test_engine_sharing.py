"""What is done once: shared prefixes and identical jobs are computed once, layers are loaded once for all jobs of a sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given

from flexgen_helm import Job
from flexgen_helm.execution.interfaces import LogitsHandler
from flexgen_helm.execution.serial import SerialExecutor
from flexgen_helm.schedule.operations import Operation
from flexgen_helm.schedule.rows import Sweep
from tests.jobs import job_mixes, random_tokens
from tests.runtime.test_exactness import few_examples
from tests.workbench import NARROW, Workbench

OnOperation = Callable[[Operation], None]
BOTH_KINDS = ["qwen2", "nemotron_h"]
"""A family of packed rows and one of single rows."""


def trie_size(prompts: Iterable[Sequence[int]]) -> int:
    """Counts the nodes of a trie over the prompts, the root left out."""
    root: dict[int, Any] = {}
    count = 0
    for prompt in prompts:
        node = root
        for token in prompt:
            if token not in node:
                node[token] = {}
                count += 1
            node = node[token]
    return count


@few_examples
@given(jobs=job_mixes(max_jobs=20))
def test_prompt_tokens_computed_is_the_size_of_the_prefix_tree(bench: Workbench, jobs: list[Job]) -> None:
    # One token more for each job, so that its last prompt token is needed as well.
    jobs = [Job(token_ids=job.token_ids, max_new_tokens=1 + job.max_new_tokens) for job in jobs]
    engine = bench.engine("qwen2")
    results = engine.run(jobs)
    prompts = [job.token_ids or [] for job in jobs]
    assert engine.stats.num_jobs == len(jobs)
    assert engine.stats.prompt_tokens_asked == sum(len(prompt) for prompt in prompts)
    assert engine.stats.prompt_tokens_computed == trie_size(prompts)
    assert [result.prompt_token_ids for result in results] == [list(prompt) for prompt in prompts]


def test_few_shot_prefix_is_computed_once_for_scoring(bench: Workbench) -> None:
    prefix = random_tokens(51, 50)
    prompts = [prefix + random_tokens(52 + number, 5) for number in range(30)]
    engine = bench.engine("qwen2")
    engine.run([Job(token_ids=prompt, max_new_tokens=1, score_prompt=True) for prompt in prompts])
    assert engine.stats.prompt_tokens_computed == trie_size(prompts)
    assert engine.stats.sweeps == 1


@pytest.mark.parametrize("family", BOTH_KINDS)
def test_identical_jobs_are_computed_once(bench: Workbench, family: str) -> None:
    engine, prompt = bench.engine(family), random_tokens(61, 30)
    for temperature in (0.0, 1.0):
        job = Job(token_ids=prompt, max_new_tokens=6, temperature=temperature, seed=1)
        single = engine.run([job])[0]
        once = engine.stats
        assert engine.run([job] * 5) == [single] * 5
        assert engine.stats.prompt_tokens_computed == once.prompt_tokens_computed == len(prompt)
        assert engine.stats.prompt_tokens_asked == 5 * len(prompt)
        assert engine.stats.sweeps == once.sweeps


@pytest.mark.parametrize("family", BOTH_KINDS)
def test_a_job_is_answered_before_longer_ones_with_the_same_prompt(bench: Workbench, family: str) -> None:
    engine, prompt, order = bench.engine(family), random_tokens(66, 30), list[int]()
    limits = [(9, False), (2, False), (0, True), (4, True), (2, True)]
    jobs = [Job(token_ids=prompt, max_new_tokens=new, score_prompt=scored) for new, scored in limits]
    together = engine.run(jobs, on_result=lambda index, result: order.append(index))
    assert order == [2, 1, 4, 3, 0]
    assert together == [engine.run([job])[0] for job in jobs]


def test_single_rows_share_no_prefix_and_compute_no_prompt_twice(bench: Workbench) -> None:
    prefix = random_tokens(51, 50)
    prompts = [prefix, *(prefix + random_tokens(52 + number, 5) for number in range(6))]
    engine = bench.engine("nemotron_h")
    engine.run([Job(token_ids=prompt, max_new_tokens=new) for prompt in prompts for new in (1, 3)])
    assert engine.stats.prompt_tokens_asked == 2 * sum(map(len, prompts))
    assert engine.stats.prompt_tokens_computed == sum(map(len, prompts))
    assert engine.stats.sweeps == 3


@pytest.mark.parametrize(("family", "rows"), [("qwen2", 64 * 8 // 32), ("nemotron_h", 64)])
def test_each_layer_is_loaded_once_for_all_jobs_of_a_sweep(
    bench: Workbench, family: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 prompts in ``rows`` rows, then four sweeps in which all of them decode, in rows of 16."""
    operations: list[list[Operation]] = []
    run = SerialExecutor.run

    def noted(executor: SerialExecutor[Any], sweep: Sweep, on_logits: LogitsHandler, on_operation: OnOperation) -> None:
        def note(operation: Operation) -> None:
            operations[-1].append(operation)
            on_operation(operation)

        operations.append([])
        run(executor, sweep, on_logits, note)

    engine = bench.engine(family)
    num_layers = len(bench.reference(family).model.get_decoder().layers)
    monkeypatch.setattr(SerialExecutor, "run", noted)
    engine.run([Job(token_ids=random_tokens(seed, 8), max_new_tokens=5) for seed in range(64)])
    assert len(operations) == engine.stats.sweeps == 5
    for sweep, num_rows in zip(operations, [rows] + 4 * [64 // 16], strict=True):
        assert [j for j, _ in groupby(o.j for o in sweep if o.kind == "compute")] == list(range(num_layers))
        computed = Counter(operation.j for operation in sweep if operation.kind == "compute")
        assert computed == dict.fromkeys(range(num_layers), num_rows)


def test_a_small_block_computes_at_least_the_tree_and_at_most_everything(bench: Workbench) -> None:
    prefix = random_tokens(71, 40)
    prompts = [prefix + random_tokens(72 + number, 10) for number in range(40)]
    engine = bench.engine("qwen2", policy=NARROW)
    engine.run([Job(token_ids=prompt, max_new_tokens=4) for prompt in prompts])
    computed = engine.stats.prompt_tokens_computed
    assert trie_size(prompts) <= computed < engine.stats.prompt_tokens_asked


@pytest.mark.parametrize("family", BOTH_KINDS)
@pytest.mark.parametrize("num_completions", [1, 10])
def test_decoding_stays_within_the_slots_of_a_block(bench: Workbench, num_completions: int, family: str) -> None:
    engine = bench.engine(family, policy=NARROW)
    jobs = [
        Job(token_ids=random_tokens(seed, 5), max_new_tokens=6, temperature=1.0, num_completions=num_completions)
        for seed in range(80 // num_completions)
    ]
    engine.run(jobs)
    # The first token of a completion comes from the prompt and needs no slot yet.
    decoded = engine.stats.generated_tokens - 80
    assert engine.stats.sweeps >= decoded / NARROW.block_size


@pytest.mark.parametrize("family", BOTH_KINDS)
def test_statistics_of_generation(bench: Workbench, family: str) -> None:
    engine = bench.engine(family)
    results = engine.run([Job(token_ids=random_tokens(seed, 10), max_new_tokens=seed) for seed in range(1, 9)])
    stats = engine.stats
    assert stats.generated_tokens == sum(len(c.token_ids) for result in results for c in result.completions)
    # All fit in the block, so that no sweep is spent on fewer jobs than could be in it.
    assert stats.sweeps == 8
    assert stats.seconds > 0
    assert stats.peak_bytes > 0
