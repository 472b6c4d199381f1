"""Mixtures of experts in slices, against slices made token by token and against transformers' own experts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from flexgen_helm.model.experts import SLICE_STEP, sliced_experts

FAMILIES = {"mixtral": (MixtralConfig, MixtralExperts), "gpt_oss": (GptOssConfig, GptOssExperts)}


@cache
def experts_of(family: str, num_experts: int, hidden: int, dtype: torch.dtype) -> Any:
    config, experts = FAMILIES[family]
    made = experts(config(num_local_experts=num_experts, hidden_size=hidden, intermediate_size=24)).to(dtype)
    generator = torch.Generator().manual_seed(num_experts)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made.requires_grad_(False)


def token_by_token(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Pairs of a token and a rank go to their expert's newest slice, in the order of tokens, or begin a new one."""
    num_tokens, k = chosen.shape
    average = num_tokens * k / experts.num_experts
    size = next(steps for steps in range(SLICE_STEP, num_tokens * k + SLICE_STEP, SLICE_STEP) if steps >= average)
    slices: list[tuple[int, list[tuple[int, int]]]] = []
    newest: dict[int, list[tuple[int, int]]] = {}
    for token, own in enumerate(chosen.tolist()):
        for rank, expert in enumerate(own):
            if len(newest.get(expert, ())) % size == 0:
                newest[expert] = []
                slices.append((expert, newest[expert]))
            newest[expert].append((token, rank))
    outputs = torch.zeros(num_tokens, k, hidden.shape[1], dtype=hidden.dtype)
    for expert, pairs in slices:
        inputs = torch.zeros(size, hidden.shape[1], dtype=hidden.dtype)
        for row, (token, _) in enumerate(pairs):
            inputs[row] = hidden[token]
        for (token, rank), output in zip(pairs, worked(experts, expert, inputs), strict=False):
            outputs[token, rank] = output
    return (outputs * weights[..., None].to(outputs.dtype)).sum(1)


def worked(experts: Any, expert: int, x: Tensor) -> Tensor:
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name)[expert]
        bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
        x = linear(x, weight.T if experts.is_transposed else weight, bias)
        x = experts._apply_gate(x) if name == "gate_up_proj" else x
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 90),
    k=st.integers(1, 8),
    num_experts=st.sampled_from([1, 4, 8, 40]),
    num_used=st.integers(1, 40),
    hidden=st.sampled_from([7, 24, 64]),
    seed=st.integers(0, 2**20),
)
@example(num_tokens=90, k=1, num_experts=8, num_used=1, hidden=24, seed=0)  # all tokens to one expert, in 6 slices
@example(num_tokens=32, k=2, num_experts=4, num_used=2, hidden=24, seed=0)  # slices without padding
@example(num_tokens=1, k=8, num_experts=40, num_used=40, hidden=64, seed=0)
def test_slices_are_those_of_each_experts_tokens_in_order(
    family: str, dtype: torch.dtype, num_tokens: int, k: int, num_experts: int, num_used: int, hidden: int, seed: int
) -> None:
    k = min(k, num_experts)
    num_used = min(max(num_used, k), num_experts)
    experts = experts_of(family, num_experts, hidden, dtype)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    weights, chosen = torch.rand(num_tokens, num_used, generator=generator).topk(k)
    chosen = torch.randperm(num_experts, generator=generator)[chosen]
    found = sliced_experts(experts, states, chosen, weights)
    assert found.dtype == dtype
    assert torch.equal(found, token_by_token(experts, states, chosen, weights))
    if dtype == torch.float32:
        torch.testing.assert_close(found, experts(states, chosen, weights), rtol=1e-4, atol=1e-4)
