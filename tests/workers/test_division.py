"""Which worker gets which job."""

from __future__ import annotations

import itertools
import os
import random

import pytest

from flexgen_helm.types import Job
from flexgen_helm.workers.division import CHARACTERS, SLACK, divide


def cost(jobs: list[Job]) -> float:
    """Tokens that one engine computes for jobs: characters of the trie of all prompts, and new tokens."""
    prefixes = {prompt[:length] for prompt in {job.prompt or "" for job in jobs} for length in range(1, len(prompt) + 1)}
    return len(prefixes) / CHARACTERS + sum(job.max_new_tokens * job.num_completions for job in jobs)


def cheapest(jobs: list[Job], most: int) -> float:
    """The cost of the costliest piece in the best division into neighbours in alphabetical order, by trying all."""
    prompts = sorted({job.prompt or "" for job in jobs})
    best = cost(jobs)
    for cuts in itertools.combinations(range(1, len(prompts)), min(most, len(prompts)) - 1):
        pieces = [set(prompts[a:b]) for a, b in itertools.pairwise([0, *cuts, len(prompts)])]
        best = min(best, max(cost([job for job in jobs if job.prompt in piece]) for piece in pieces))
    return best


def random_jobs(seed: int) -> list[Job]:
    draw = random.Random(seed)
    prefixes = ["".join(draw.choices("ab", k=draw.randint(0, 30))) for _ in range(3)]
    return [
        Job(prompt=draw.choice(prefixes) + "".join(draw.choices("ab", k=draw.randint(1, 5))), max_new_tokens=draw.randint(0, 9))
        for _ in range(draw.randint(1, 9))
    ]


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_every_job_has_one_worker_and_the_costliest_share_is_about_the_least_possible(seed: int, most: int) -> None:
    jobs = random_jobs(seed)
    pieces = divide(jobs, most)
    assert sorted(index for piece in pieces for index in piece) == list(range(len(jobs)))
    assert 1 <= len(pieces) <= most
    assert all(piece == sorted(piece) and piece for piece in pieces)
    prompts = [{jobs[index].prompt for index in piece} for piece in pieces]
    assert sum(map(len, prompts)) == len({job.prompt for job in jobs})  # equal prompts have one worker
    costs = [cost([jobs[index] for index in piece]) for piece in pieces]
    assert max(costs) <= SLACK * cheapest(jobs, most) * (1 + 1e-9)


def test_jobs_of_one_long_prefix_stay_together() -> None:
    subjects = [letter * 400 for letter in "abcd"]
    jobs = [Job(prompt=f"{subject}{number:02}", max_new_tokens=1) for number in range(25) for subject in subjects]
    pieces = divide(jobs, 2)
    assert [len({(jobs[index].prompt or "")[0] for index in piece}) for piece in pieces] == [2, 2]
    assert [len(piece) for piece in pieces] == [50, 50]


def test_jobs_of_the_only_prefix_are_divided() -> None:
    jobs = [Job(prompt="a" * 100 + f"{number:02}" + "b" * 200) for number in range(40)]
    assert [len(piece) for piece in divide(jobs, 4)] == [10] * 4


def test_a_long_answer_counts_as_much_as_a_long_prompt() -> None:
    jobs = [Job(prompt="a", max_new_tokens=100), *(Job(prompt=f"b{number}" * 40, max_new_tokens=1) for number in range(5))]
    assert [len(piece) for piece in divide(jobs, 2)] == [1, 5]


def test_fewer_prompts_than_workers() -> None:
    assert divide([], 3) == []
    assert divide([Job(prompt="a"), Job(prompt="b"), Job(prompt="a")], 3) == [[0, 2], [1]]


def test_conversations_and_token_ids_are_prompts_too() -> None:
    system = {"role": "system", "content": "Answer shortly. " * 20}
    jobs: list[Job] = [Job(messages=[system, {"role": "user", "content": str(number)}]) for number in (1, 2)]
    jobs += [Job(token_ids=[*range(100), number]) for number in (1, 2)]
    assert divide(jobs, 2) == [[2, 3], [0, 1]] or divide(jobs, 2) == [[0, 1], [2, 3]]


def test_many_long_prompts_take_no_time() -> None:
    prefixes = [os.urandom(4000).hex() for _ in range(20)]
    jobs = [Job(prompt=f"{prefix}{number}", max_new_tokens=1) for prefix in prefixes for number in range(200)]
    assert [len(piece) for piece in divide(jobs, 4)] == [1000] * 4
