"""The schemes that are compared, and the comparison, on random weights and a tiny model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flexgen_helm.compression.minmax import MinMax, dequantize
from flexgen_helm.compression.sensitivity import Sensitivity
from flexgen_helm.runs.quantizers import __main__ as command
from flexgen_helm.runs.quantizers import last_words, protocol
from flexgen_helm.runs.quantizers.last_words import Answers, Passage, Quiz
from flexgen_helm.runs.quantizers.protocol import Subject
from flexgen_helm.runs.quantizers.schemes import SCHEMES, Statistics


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_keep_names_and_shapes_and_stay_within_their_bits(name: str) -> None:
    chance = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(1024, 384, generator=chance), "b": torch.randn(768, 512, generator=chance)}
    columns = {"a": torch.rand(384, generator=chance) ** 4, "b": torch.rand(512, generator=chance) ** 4}
    known = {key: Sensitivity(columns[key], torch.rand(len(x), generator=chance) ** 4) for key, x in weights.items()}
    quantised = SCHEMES[name](weights, Statistics(known, known), 4)
    assert {key: x.shape for key, x in quantised.weights.items()} == {key: x.shape for key, x in weights.items()}
    assert 4.45 < quantised.bits <= 4.5
    for key, weight in weights.items():
        error = ((quantised.weights[key] - weight).square() * columns[key]).sum()
        worst = ((dequantize(MinMax(4).quantize(weight)) - weight).square() * columns[key]).sum()
        assert error <= worst


class TinyModel(nn.Module):
    """Predicts from one linear layer over one-hot ids."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=20)
        self.linear = nn.Linear(20, 20, bias=False)

    def forward(self, ids: torch.Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> SimpleNamespace:
        """Keeps the logits of the last tokens only, if told so; 0 keeps all, as in transformers."""
        return SimpleNamespace(logits=self.linear(nn.functional.one_hot(ids, 20).float())[:, -logits_to_keep:])


def letters(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer of single letters; token 3 would begin the text if it were asked for."""
    return {"input_ids": [3] * add_special_tokens + [4 + ord(letter) % 16 for letter in text]}


@pytest.fixture
def subject() -> Subject:
    torch.manual_seed(0)
    subject = Subject.__new__(Subject)
    subject.off_grid, subject.tokenizer = False, letters
    subject.model = TinyModel()
    subject.linears = {"linear": subject.model.linear}
    subject.weights = {"linear": subject.model.linear.weight.data.clone()}
    subject.end, subject.windows = 2, torch.randint(20, (3, 40))
    return subject


def test_random_ids_are_ordinary_ones_behind_the_end_token(subject: Subject) -> None:
    ids = subject.random_ids()
    assert ids.numel() == 2048
    assert set(ids[:, 0].tolist()) == {subject.end}
    assert set(ids[:, 1:].flatten().tolist()) == set(range(10, 20))


@torch.no_grad()
def test_sensitivities_are_gradients_within_a_layer(subject: Subject) -> None:
    """Of a layer that adds a product to its input: the gradient at the product is the probe, of the variance 1 / norm**2."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(20, 20, bias=False)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            added: torch.Tensor = self.linear(hidden)
            return hidden + added

    layers = [Layer(), Layer()]

    def forward(ids: torch.Tensor, use_cache: bool) -> None:
        hidden = nn.functional.one_hot(ids, 20).float()
        for layer in layers:
            hidden = layer(hidden)

    subject.model.model = forward
    forward.layers = nn.ModuleList(layers)  # type: ignore[attr-defined]
    subject.linears = {str(j): layer.linear for j, layer in enumerate(layers)}
    ids = torch.randint(20, (16, 500), generator=torch.Generator().manual_seed(0))
    found = subject.sensitivities(ids)
    hidden = nn.functional.one_hot(ids, 20).double().flatten(0, 1)
    for j, layer in enumerate(layers):
        inputs, hidden = hidden, hidden + hidden @ layer.linear.weight.T.double()
        variance = 1 / hidden.square().sum(1, keepdim=True)
        columns, rows = 20 * (inputs.square() * variance).mean(0), variance.mean().expand(20)
        torch.testing.assert_close(found[str(j)].columns.double(), columns, rtol=0.1, atol=0)
        torch.testing.assert_close(found[str(j)].rows.double(), rows, rtol=0.1, atol=0)


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


def test_last_words_begin_at_their_space() -> None:
    (passage,) = last_words.split_passages([" a bc def \n"], letters, end=2)
    assert passage == Passage([2, *letters("a bc def", add_special_tokens=False)["input_ids"]], word_tokens=4)


PASSAGES = st.lists(
    st.tuples(st.lists(st.integers(0, 19), min_size=2, max_size=5), st.integers(1, 4)).map(
        lambda pair: Passage(pair[0], min(pair[1], len(pair[0]) - 1))
    ),
    min_size=1,
    max_size=80,
)


@given(PASSAGES)
@torch.inference_mode()
def test_answers_are_those_of_each_passage_alone(passages: list[Passage]) -> None:
    torch.manual_seed(0)
    model = TinyModel()
    after = model.linear.weight.T.double().log_softmax(-1)
    found = last_words.answer(model, passages)
    for at, passage in enumerate(passages):
        pairs = list(zip(passage.ids, passage.ids[1:], strict=False))[-passage.word_tokens :]
        assert found.losses[at] == pytest.approx(-sum(after[pair].item() for pair in pairs), rel=1e-4)
        assert found.right[at] == all(after[before].argmax() == token for before, token in pairs)


def test_standard_errors_and_differences_are_those_of_their_definitions() -> None:
    losses = np.array([0.5, 1.5, 1.0, 2.0, 0.25, 0.75, 4.0, 3.0])
    answers = Answers(losses, np.array([1.0, 0, 0, 0, 0, 0, 1, 1]))
    other = Answers(losses - math.log(2), np.array([0.0, 1, 1, 1, 1, 1, 1, 1]))
    summary = last_words.summarize(answers)
    assert (summary.passages, summary.accuracy) == (8, 3 / 8)
    assert summary.accuracy_error == pytest.approx(math.sqrt(3 / 8 * 5 / 8 / 7))
    assert summary.perplexity == pytest.approx(math.exp(13 / 8))
    assert summary.perplexity_error == pytest.approx(math.exp(13 / 8) * np.std(losses, ddof=1) / math.sqrt(8))
    found = last_words.compare(answers, other)
    assert (found.gained, found.lost, found.accuracy.value) == (1, 5, -0.5)
    assert found.p_value == pytest.approx(2 * (1 + 6) / 2**6)
    assert found.accuracy.interval is not None
    # The normal interval of differences that are 1, -1 five times, and 0 twice, to a step of the accuracy.
    error = 1.96 * np.std([1, *[-1] * 5, 0, 0]) / math.sqrt(8)
    assert found.accuracy.interval == pytest.approx((-0.5 - error, -0.5 + error), abs=1 / 8)
    assert found.perplexity.value == pytest.approx(2)
    assert found.perplexity.interval == pytest.approx((2, 2))
    assert last_words.compare(answers, answers).p_value == 1


@torch.inference_mode()
def test_models_are_compared_with_the_first_and_the_one_before() -> None:
    torch.manual_seed(0)
    models = [TinyModel() for _ in range(3)]
    passages = [Passage([2, at, 19 - at], 1) for at in range(20)]
    answers = [last_words.answer(model, passages) for model in models]
    quiz = Quiz(passages)
    found = [quiz.ask(model) for model in models]
    assert (found[0].from_first.gained, found[0].from_first.perplexity.value) == (0, 1)
    assert found[1].from_first == found[1].from_previous == last_words.compare(answers[1], answers[0])
    assert found[2].from_first == last_words.compare(answers[2], answers[0])
    assert found[2].from_previous == last_words.compare(answers[2], answers[1])


def test_command_reads_the_chosen_text_and_asks_for_last_words(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[bool, str]] = []

    def noted(off_grid: bool, text: str) -> Subject:
        asked.append((off_grid, text))
        return subject

    monkeypatch.setattr(command, "Subject", noted)
    monkeypatch.setattr(command, "lambada_passages", lambda: ["a bc", "d ef", "not asked for"])
    options = ["--text", "news", "--lambada", "2", "--grid", "on", "--schemes", "minmax", "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["quantizers", *options])
    assert command.main() == 0
    assert asked == [(False, "news")]
    exact, minmax = json.loads((tmp_path / "x.json").read_text())
    assert exact["last_words"]["summary"]["passages"] == 2
    assert minmax["last_words"]["from_first"]["perplexity"]["value"] == pytest.approx(
        minmax["last_words"]["summary"]["perplexity"] / exact["last_words"]["summary"]["perplexity"]
    )
    assert "last words of 2 passages" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["1", "5154", "-3", "all"])
def test_numbers_of_passages_that_say_nothing_are_refused(
    number: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quantizers", f"--lambada={number}"])
    with pytest.raises(SystemExit):
        command.main()
    assert f"'{number}' is no number from 2 to 5,153" in capsys.readouterr().err
