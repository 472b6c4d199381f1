"""Random numbers, nucleus and greedy choice against SciPy, NumPy and transformers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import TopPLogitsWarper

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.generation.sampling import UniformStream, choose, most_likely, top_candidates
from flexgen_helm.types import TokenLogprob

EXAMPLES = settings(derandomize=True, max_examples=50, deadline=None)

logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=60)
small_ids = st.lists(st.integers(0, 2**31), min_size=1, max_size=8)


def _logits(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def test_uniform_is_uniform() -> None:
    numbers = [UniformStream([5, 7], 3, completion).at(step) for completion in range(20) for step in range(500)]
    assert min(numbers) >= 0
    assert max(numbers) < 1
    assert stats.kstest(numbers, "uniform").pvalue > 0.01
    # Neighbouring steps are independent: pairs fill the unit square evenly.
    counts, _, _ = np.histogram2d(numbers[:-1], numbers[1:], bins=10, range=[[0, 1], [0, 1]])
    assert stats.chisquare(counts.ravel()).pvalue > 0.01


def test_uniform_depends_on_each_argument() -> None:
    arguments = [
        ([1, 2], 0, 0, 0),
        ([1, 2, 0], 0, 0, 0),
        ([1], 2, 0, 0),
        ([2, 1], 0, 0, 0),
        ([1, 2], 1, 0, 0),
        ([1, 2], -1, 0, 0),
        ([1, 2], 2**80, 0, 0),
        ([1, 2], 0, 1, 0),
        ([1, 2], 0, 0, 1),
        ([1, 2], 256, 0, 0),
    ]
    assert len({UniformStream(*each[:-1]).at(each[-1]) for each in arguments}) == len(arguments)


@EXAMPLES
@given(small_ids, st.none() | st.integers(), st.integers(0, 9), st.integers(0, 4000))
def test_uniform_is_a_function(ids: list[int], seed: int | None, completion: int, step: int) -> None:
    number = UniformStream(ids, seed, completion).at(step)
    assert number == UniformStream(tuple(ids), seed or 0, completion).at(step)
    stream = UniformStream(ids, seed, completion)
    stream.at(step + 1)
    assert number == stream.at(step)


@EXAMPLES
@given(logit_lists)
def test_greedy_is_numpy_argmax(values: list[float]) -> None:
    logits = torch.tensor(values)
    expected = int(np.argmax(np.array(values, dtype=np.float32)))
    assert choose(logits, temperature=0.0, top_p=0.1, u=0.99) == expected
    assert choose(logits, temperature=1e-3, top_p=0.1, u=0.99) == expected
    assert most_likely(torch.stack([logits, -logits]))[0] == expected


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    logits = torch.zeros(3, 70_000)
    logits[:, 333] = logits[:, 44_444] = logits[:, 69_999] = 1.5
    assert most_likely(logits) == [333, 333, 333]


def test_the_most_likely_token_is_taken_at_small_temperatures_however_close_the_next_one_is() -> None:
    """HELM writes 1e-4, or 1e-7 in some scenarios, where it means 0."""
    logits = torch.tensor([1.0, 1.00001, 1.0])
    for temperature in (0.0, 1e-7, 1e-4, 1e-3):
        assert {choose(logits, temperature=temperature, top_p=1.0, u=step / 10) for step in range(10)} == {1}
    assert {choose(logits, temperature=1.1e-3, top_p=1.0, u=step / 10) for step in range(10)} == {0, 1, 2}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.3, 1.0), (2.5, 1.0), (1.0, 0.9), (2.0, 0.7)])
def test_samples_follow_the_distribution(temperature: float, top_p: float) -> None:
    logits = _logits(40, seed=1)
    scores = logits.double() / temperature
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores[None])[0]
    expected = torch.softmax(scores, dim=-1).numpy()
    draws = [choose(logits, temperature=temperature, top_p=top_p, u=UniformStream([1], 0, 0).at(step)) for step in range(5000)]
    observed = np.bincount(draws, minlength=len(expected))
    assert observed[expected == 0].sum() == 0
    # Chi-square needs a few expected counts in each bin: rare tokens share one.
    rare = (expected > 0) & (expected * len(draws) < 10)
    bins = (expected > 0) & ~rare
    counts = np.append(observed[bins], observed[rare].sum())
    wanted = np.append(expected[bins], expected[rare].sum()) * len(draws)
    counts, wanted = (counts[:-1], wanted[:-1]) if wanted[-1] < 1 else (counts, wanted)
    assert stats.chisquare(counts, wanted * counts.sum() / wanted.sum()).pvalue > 0.01


@EXAMPLES
@given(logit_lists, st.floats(0.01, 1), st.floats(0.05, 5), st.floats(0, 1, exclude_max=True))
def test_choice_lies_in_the_nucleus(values: list[float], top_p: float, temperature: float, u: float) -> None:
    logits = torch.tensor(values)
    token_id = choose(logits, temperature=temperature, top_p=top_p, u=u)
    probs = torch.softmax(logits.double() / temperature, -1).numpy()
    assert probs[token_id] > 0
    above = probs[probs > probs[token_id]].sum() + probs[:token_id][probs[:token_id] == probs[token_id]].sum()
    assert above < top_p + 1e-12


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999])
def test_nucleus_is_that_of_transformers(top_p: float) -> None:
    for seed in range(20):
        logits = _logits(200, seed)
        kept = TopPLogitsWarper(top_p)(None, logits.double()[None])[0].isfinite()
        probs = torch.softmax(logits.double(), -1) * kept
        cdf = (probs / probs.sum()).cumsum(0)
        middles = cdf - probs / probs.sum() / 2
        chosen = [choose(logits, temperature=1.0, top_p=top_p, u=float(middles[i])) for i in kept.nonzero()]
        assert chosen == kept.nonzero().flatten().tolist()


def test_nucleus_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(10)
    drawn = {choose(logits, temperature=1.0, top_p=0.35, u=step / 100) for step in range(100)}
    assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize("size", [2, 4, 16, 32])
def test_a_nucleus_that_reaches_top_p_exactly_ends_there(size: int) -> None:
    """Probabilities of 1 / size are exact here, and so are their sums."""
    logits = torch.zeros(size)
    for count in range(1, size):
        top_p = count / size
        drawn = {choose(logits, temperature=1.0, top_p=top_p, u=(i + 0.5) / size) for i in range(size)}
        assert drawn == set(range(count))
        assert TopPLogitsWarper(top_p)(None, logits.double()[None])[0].isfinite().sum() == count


@EXAMPLES
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_rounding_of_logits_does_not_reorder(seed: int, step: int) -> None:
    """Two tokens that are equal but for noise must not swap their places in the distribution."""
    logits = _logits(50, seed)
    logits[20] = logits[30] = logits.max() + 1
    u = UniformStream([seed], 0, 0).at(step)
    noisy = logits.clone()
    noisy[20] += 1e-6
    noisy[30] -= 1e-6
    cdf = torch.softmax(logits.double(), -1).cumsum(0)
    if float((cdf - u).abs().min()) > 1e-5:
        exact = choose(logits, temperature=1.0, top_p=1.0, u=u)
        assert exact == choose(noisy, temperature=1.0, top_p=1.0, u=u)
        assert exact == int(np.searchsorted(cdf.numpy(), u, side="right"))


def test_largest_random_number_chooses_a_possible_token() -> None:
    for seed in range(50):
        logits = _logits(1000, seed)
        logits[-100:] = -float("inf")
        assert choose(logits, temperature=1.0, top_p=1.0, u=1 - 2**-53) < 900


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(bad: float, temperature: float) -> None:
    logits = _logits(30, seed=0)
    logits[7] = bad
    with pytest.raises(UnsupportedModel, match=r"not finite.*float32"):
        choose(logits, temperature=temperature, top_p=1.0, u=0.5)


@EXAMPLES
@given(st.data(), st.integers(1, 40), st.integers(1, 5))
def test_top_candidates_are_sorted_with_ties_to_the_lower_id(data: st.DataObject, vocab: int, num_rows: int) -> None:
    """Tokens of probability 0 are none."""
    possible = st.integers(-3, 0).map(float) | st.just(-math.inf)
    rows = data.draw(st.lists(st.lists(possible, min_size=vocab, max_size=vocab), min_size=num_rows, max_size=num_rows))
    counts = data.draw(st.lists(st.integers(0, vocab), min_size=num_rows, max_size=num_rows))
    ranked = [sorted(enumerate(row), key=lambda pair: (-pair[1], pair[0])) for row in rows]
    expected = [
        [TokenLogprob(*pair) for pair in row[:count] if pair[1] > -math.inf] for row, count in zip(ranked, counts, strict=True)
    ]
    assert top_candidates(torch.tensor(rows), counts) == expected


@pytest.mark.parametrize("num_tied", [2, 11, 500])
def test_tokens_that_compete_for_the_last_place(num_tied: int) -> None:
    """Of many tokens; the other row has no ties."""
    logprobs = torch.stack([torch.full((3_000,), -9.0), -torch.arange(3_000.0)])
    logprobs[0, 2_998] = -1.0
    tied = torch.randperm(2_990, generator=torch.Generator().manual_seed(num_tied))[:num_tied]
    logprobs[0, tied] = -2.0
    expected = [(2_998, -1.0), *((token_id, -2.0) for token_id in sorted(tied.tolist()))]
    expected += [(token_id, -9.0) for token_id in range(2_990) if token_id not in set(tied.tolist())]
    for count in (1, 2, 10, 12):
        assert top_candidates(logprobs, [count, 3]) == [expected[:count], [(0, 0.0), (1, -1.0), (2, -2.0)]]
