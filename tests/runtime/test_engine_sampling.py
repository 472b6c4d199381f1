"""Sampled answers: what they may depend on, and whether they follow the model's distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flexgen_helm import Engine, Job
from flexgen_helm.generation.sampling import UniformStream
from tests.jobs import fixed_mix, random_tokens
from tests.reference import TOKEN_TOLERANCE, Reference, largest
from tests.workbench import Workbench

PROMPT = random_tokens(41, 20)
SAMPLED = Job(token_ids=PROMPT, max_new_tokens=8, temperature=0.9, num_completions=3, seed=5, top_logprobs=3)
DRAWS = 600
"""Completions of one job from which a distribution is estimated."""


@pytest.fixture(scope="module", params=["qwen3", "nemotron_h"])
def family(request: pytest.FixtureRequest) -> str:
    """One of packed rows and one of single rows."""
    return str(request.param)


@pytest.fixture(scope="module")
def engine(bench: Workbench, family: str) -> Engine:
    return bench.engine(family)


@pytest.fixture(scope="module")
def reference(bench: Workbench, family: str) -> Reference:
    return bench.reference(family)


def test_samples_do_not_depend_on_neighbours(engine: Engine) -> None:
    alone = engine.run([SAMPLED])[0]
    others = [replace(job, temperature=1.0, seed=number) for number, job in enumerate(fixed_mix(43, 24))]
    assert engine.run([*others[:12], SAMPLED, *others[12:]])[12] == alone


def test_completions_seeds_and_prompts_draw_different_samples(engine: Engine) -> None:
    jobs = [SAMPLED, replace(SAMPLED, seed=6), replace(SAMPLED, token_ids=random_tokens(42, 20))]
    drawn = [tuple(c.token_ids) for result in engine.run(jobs) for c in result.completions]
    assert len(set(drawn)) == len(drawn) == 9


def test_no_seed_is_seed_zero(engine: Engine) -> None:
    none, zero = engine.run([replace(SAMPLED, seed=None), replace(SAMPLED, seed=0)])
    assert none == zero


def test_fewer_completions_are_the_first_of_more(engine: Engine) -> None:
    three, one = engine.run([SAMPLED, replace(SAMPLED, num_completions=1)])
    assert one.completions == three.completions[:1]


def test_many_seeds_of_one_prompt_equal_each_alone(engine: Engine) -> None:
    jobs = [replace(SAMPLED, seed=seed, num_completions=1 + seed % 3, max_new_tokens=2 + seed) for seed in range(7)]
    assert [engine.run([job])[0] for job in jobs] == engine.run(jobs)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.9, 1.0), (1.2, 0.8)])
def test_samples_are_those_of_one_sequence_at_a_time(
    engine: Engine, reference: Reference, temperature: float, top_p: float
) -> None:
    """With the same random numbers, which choose a token where the distribution of the reference reaches them."""
    job = replace(SAMPLED, temperature=temperature, top_p=top_p)
    for seed in range(4):
        for number, completion in enumerate(engine.run([replace(job, seed=seed)])[0].completions):
            tokens: list[int] = []
            for step in range(job.max_new_tokens):
                cdf = warped(reference.log_probs(PROMPT + tokens)[-1], temperature, top_p).cumsum(0)
                tokens.append(int((cdf <= UniformStream(PROMPT, seed, number).at(step)).sum()))
            assert completion.token_ids == tokens


def test_logprobs_are_those_of_the_unwarped_model(engine: Engine, reference: Reference) -> None:
    for completion in engine.run([replace(SAMPLED, temperature=0.5, top_p=0.7)])[0].completions:
        scores = reference.score(PROMPT + completion.token_ids)[len(PROMPT) :]
        assert largest(a - b for a, b in zip(scores, completion.logprobs, strict=True)) <= TOKEN_TOLERANCE


def test_temperature_near_zero_is_greedy(engine: Engine) -> None:
    greedy = Job(token_ids=PROMPT, max_new_tokens=8, num_completions=3)
    single, three, nearly = engine.run(
        [replace(greedy, num_completions=1), greedy, replace(greedy, temperature=1e-3, top_p=0.5)]
    )
    assert three.completions == single.completions * 3
    assert nearly == three


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.5)])
def test_samples_follow_the_distribution(engine: Engine, reference: Reference, temperature: float, top_p: float) -> None:
    job = Job(token_ids=PROMPT, max_new_tokens=1, temperature=temperature, top_p=top_p, num_completions=DRAWS, seed=3)
    drawn = torch.tensor([completion.token_ids[0] for completion in engine.run([job])[0].completions])
    expected = DRAWS * warped(reference.log_probs(PROMPT)[-1], temperature, top_p)
    observed = torch.bincount(drawn, minlength=len(expected)).double()
    assert observed[expected == 0].sum() == 0
    # Pearson's statistic over the tokens expected often enough; the others count as one.
    often = expected >= 5
    expected = torch.cat([expected[often], expected[~often].sum()[None]]).clamp_min(1e-9)
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    freedom = len(expected) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert freedom > 10
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def warped(log_probs: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Probabilities at a temperature, restricted to the smallest set that reaches ``top_p``."""
    values, tokens = torch.softmax(log_probs.double() / temperature, dim=-1).sort(descending=True)
    values = torch.where(values.cumsum(0) - values < top_p, values, 0.0)
    return torch.zeros_like(values).index_copy(0, tokens, values / values.sum())
