"""Calls in lockstep compute what they compute alone, and weights are met once for all of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from greenlet import getcurrent
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from flexgen_helm.rows.lockstep import run_in_lockstep

WIDTH = 24


class Layer(nn.Module):
    """Linear layers around state of each row's own; rows take the second one a different number of times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH, bias=False)

    def forward(self, hidden: Tensor, state: Tensor, times: int) -> Tensor:
        hidden = self.first(hidden).tanh() * state
        for _ in range(times):
            hidden = hidden + self.second(hidden).repeat(1, 1, 2)[..., :40]
        return hidden


def run(layer: Layer, rows: list[tuple[Tensor, Tensor, int]], size: int) -> list[Tensor]:
    found: dict[int, Tensor] = {}

    def call(i: int) -> None:
        found[i] = layer(*rows[i])

    with torch.inference_mode():
        run_in_lockstep(layer, [partial(call, i) for i in range(len(rows))], size=size)
    return [found[i] for i in range(len(rows))]


def random_rows(tokens: list[int], seed: int) -> list[tuple[Tensor, Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(1, n, WIDTH, generator=generator), torch.randn(1, 1, 40, generator=generator), i % 3)
        for i, n in enumerate(tokens)
    ]


@settings(derandomize=True, max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=40), st.sampled_from([16, 32]), st.integers(0, 99))
def test_rows_are_computed_as_if_alone(tokens: list[int], size: int, seed: int) -> None:
    layer, rows = Layer(), random_rows(tokens, seed)
    together = run(layer, rows, size)
    for row, output in zip(rows, together, strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(output, layer(*row), rtol=1e-5, atol=1e-5)


def test_tokens_of_decoding_rows_keep_their_bits_among_any_neighbours() -> None:
    layer, rows = Layer(), random_rows([1] * 40, 5)
    together = run(layer, rows, 16)
    assert all(torch.equal(run(layer, [row], 16)[0], output) for row, output in zip(rows, together, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(layer, rows[::-1], 16)[::-1], together, strict=True))


def test_weights_are_met_once_for_a_slice_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []

    layer, rows = Layer(), random_rows([1] * 40, 5)
    product = nn.functional.linear

    def watched(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tokens.shape)
        return product(tokens, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", watched)
    run(layer, [(*row[:2], 0) for row in rows], 16)
    assert seen == [torch.Size([16, WIDTH])] * 3


def test_linear_layers_with_a_forward_of_their_own_are_left_alone() -> None:
    """Such as DeepSeek V4's grouped one, whose tokens lie in another dimension."""

    class Grouped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.transpose(0, 1)).transpose(0, 1)

    layer, rows = Layer(), random_rows([1] * 5, 5)
    layer.first = Grouped(WIDTH, 40)
    for row, output in zip(rows, run(layer, rows, 16), strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(output, layer(*row), rtol=1e-5, atol=1e-5)


def test_an_error_in_one_row_reaches_the_caller_and_leaves_the_layer_as_it_was() -> None:
    layer = Layer()
    rows = [*random_rows([1, 1, 1], 5), (torch.randn(1, 1, WIDTH), torch.randn(1, 1, 7), 0)]
    with pytest.raises(RuntimeError, match="size"):
        run(layer, rows, 16)
    assert not [module for module in layer.modules() if "forward" in vars(module)]
    with torch.inference_mode():
        assert layer(*rows[0]).shape == (1, 1, 40)
    assert getcurrent().parent is None


def test_mixtures_of_experts_are_worked_together() -> None:
    torch.manual_seed(1)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=50,
    )
    config._experts_implementation = "eager"
    block = MixtralForCausalLM(config).eval().model.layers[0].mlp
    rows = [torch.randn(1, 1, 32) for _ in range(20)]
    found: dict[int, Tensor] = {}

    def call(i: int) -> None:
        found[i] = block(rows[i])

    with torch.inference_mode():
        run_in_lockstep(block, [partial(call, i) for i in range(20)], size=16)
        together = dict(found)
        for i, row in enumerate(rows):
            torch.testing.assert_close(together[i], block(row), rtol=1e-5, atol=1e-6)
        run_in_lockstep(block, [partial(call, 7)], size=16)
        assert torch.equal(found[7], together[7])
