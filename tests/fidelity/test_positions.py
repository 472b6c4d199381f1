"""Numbers of positions, against sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.errors import FlexGenError, NotFinite
from flexgen_helm.fidelity.positions import Positions, compare_logits


def probabilities(logits: list[float]) -> list[float]:
    most = max(logits)
    weights = [math.exp(value - most) for value in logits]
    return [weight / math.fsum(weights) for weight in weights]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(2, 9), st.integers(0, 99))
def test_every_number_is_its_definition(count: int, vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference, candidate = (5 * torch.randn(count, vocab, generator=generator) for _ in range(2))
    targets = torch.randint(vocab, (count,), generator=generator)
    found = compare_logits(reference, candidate, targets)
    assert len(found) == count
    for row in range(count):
        p, q = (probabilities(logits[row].tolist()) for logits in (reference, candidate))
        right = int(targets[row])
        assert found.kl[row] == pytest.approx(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-12)
        assert found.nll_reference[row] == pytest.approx(-math.log(p[right]))
        assert found.nll_candidate[row] == pytest.approx(-math.log(q[right]))
        assert found.delta_p[row] == pytest.approx(q[right] - p[right], abs=1e-12)
        assert found.agrees[row] == (p.index(max(p)) == q.index(max(q)))
        assert found.confidence[row] == pytest.approx(max(p))


def test_equal_logits_differ_by_exactly_nothing() -> None:
    logits = 9 * torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    found = compare_logits(logits, logits.clone(), torch.arange(50))
    assert not found.kl.any()
    assert not found.delta_p.any()
    assert found.agrees.all()


def test_tokens_that_both_suppress_count_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    found = compare_logits(logits, torch.tensor([[1.0, 0.0, -math.inf]]), torch.tensor([0]))
    p = probabilities([0.0, 1.0])
    assert found.kl[0] == pytest.approx(p[0] * math.log(p[0] / p[1]) + p[1] * math.log(p[1] / p[0]))


@pytest.mark.parametrize(
    ("reference", "candidate"), [([0.0, 1.0], [0.0, -math.inf]), ([math.nan, 1.0], [0.0, 1.0]), ([-math.inf, 1.0], [0.0, 1.0])]
)
def test_what_is_not_finite_is_refused(reference: list[float], candidate: list[float]) -> None:
    with pytest.raises(NotFinite, match="cannot be compared"):
        compare_logits(torch.tensor([reference]), torch.tensor([candidate]), torch.tensor([0]))


def test_other_vocabularies_are_refused() -> None:
    with pytest.raises(FlexGenError, match="3 and 4 tokens"):
        compare_logits(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))


def test_parts_are_joined_in_order() -> None:
    one, two = (Positions(*(np.array([value + i]) for i in range(6))) for value in (0.0, 10.0))
    assert Positions.joined([one, two]).delta_p.tolist() == [4.0, 14.0]
