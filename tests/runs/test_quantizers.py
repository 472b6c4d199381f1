"""The schemes that are compared, and the comparison, on random weights and a tiny model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flexgen_helm.compression.minmax import MinMax, dequantize
from flexgen_helm.compression.sensitivity import Sensitivity
from flexgen_helm.runs.quantizers import protocol
from flexgen_helm.runs.quantizers.protocol import Subject
from flexgen_helm.runs.quantizers.schemes import SCHEMES, Statistics


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_keep_names_and_shapes_and_stay_within_their_bits(name: str) -> None:
    chance = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(1024, 384, generator=chance), "b": torch.randn(768, 512, generator=chance)}
    moments = {"a": torch.rand(384, generator=chance) ** 4, "b": torch.rand(512, generator=chance) ** 4}
    sensitivities = {key: Sensitivity(moments[key], torch.rand(len(x), generator=chance) ** 4) for key, x in weights.items()}
    quantised = SCHEMES[name](weights, Statistics(moments, sensitivities), 4)
    assert {key: x.shape for key, x in quantised.weights.items()} == {key: x.shape for key, x in weights.items()}
    assert 4.45 < quantised.bits <= 4.5
    for key, weight in weights.items():
        error = ((quantised.weights[key] - weight).square() * moments[key]).sum()
        worst = ((dequantize(MinMax(4).quantize(weight)) - weight).square() * moments[key]).sum()
        assert error <= worst


class TinyModel(nn.Module):
    """Predicts from one linear layer over one-hot ids."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=20)
        self.linear = nn.Linear(20, 20, bias=False)

    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(nn.functional.one_hot(ids, 20).float()))


@pytest.fixture
def subject() -> Subject:
    torch.manual_seed(0)
    subject = Subject.__new__(Subject)
    subject.model = TinyModel()
    subject.linears = {"linear": subject.model.linear}
    subject.weights = {"linear": subject.model.linear.weight.data.clone()}
    subject.end, subject.windows = 2, torch.randint(20, (3, 40))
    return subject


@torch.inference_mode()
def test_moments_are_the_frequencies_of_random_ids(subject: Subject) -> None:
    moment = subject.moments()["linear"]
    assert moment.sum().item() == pytest.approx(1)
    assert moment[2].item() == pytest.approx(protocol.RANDOM_SEQUENCES / 2048)
    assert moment[:10].sum() == moment[2]


@torch.inference_mode()
def test_figures_are_those_of_their_definitions(subject: Subject) -> None:
    before = torch.cat([torch.full((3, 1), 2), subject.windows[:, :-1]], 1)

    def log_probs(weight: torch.Tensor) -> torch.Tensor:
        return weight.T[before].double().log_softmax(-1)

    exact, other = subject.predict(), subject.weights["linear"].roll(1, 0)
    p, q = log_probs(subject.weights["linear"]), log_probs(other)
    subject.use({"linear": other})
    found = subject.compare(exact)
    perplexity = [x.gather(2, subject.windows[..., None]).mean().neg().exp().item() for x in (p, q)]
    assert exact.perplexity == pytest.approx(perplexity[0], rel=1e-5)
    assert found.perplexity == pytest.approx(perplexity[1], rel=1e-5)
    assert found.divergence == pytest.approx((p.exp() * (p - q)).sum(2).mean().item(), abs=2e-3)
    assert found.agreement == pytest.approx((p.argmax(2) == q.argmax(2)).double().mean().item(), abs=0.02)


def test_noise_stays_within_half_a_step_of_the_grid() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    moved = weight.clone()
    protocol._move_off_grid([moved])
    blocks, change = weight.view(6, 2, 32), (moved - weight).view(6, 2, 32)
    steps = (blocks.amax(-1) - blocks.amin(-1)) / 15
    assert (change.abs().amax(-1) <= steps / 2 * 1.001).all()
    assert change.abs().mean() > steps.mean() / 8
