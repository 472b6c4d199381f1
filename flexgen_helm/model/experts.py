"""Compute mixtures of experts in slices of a fixed size, so that a token's bits do not depend on other tokens of its expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from flexgen_helm.model.linear import product_of

EXPERTS_NAME = "flexgen_helm_slices"
"""Name of `sliced_experts` in transformers' registry of experts functions."""
SLICE_STEP = 16
"""Sizes of slices, in tokens, are multiples of this."""


def register_sliced_experts() -> str:
    """Make `sliced_experts` known to transformers, which keeps it for as long as the process lives, and return its name."""
    ExpertsInterface.register(EXPERTS_NAME, sliced_experts)
    return EXPERTS_NAME


def sliced_experts(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the experts of one layer, as an experts function of transformers' interface.

    Each expert computes its tokens in slices. Their size depends on T, k and the number of experts alone: it is the average
    number of tokens of an expert, rounded up to a multiple of `SLICE_STEP`. The last slice of an expert is padded with zeros.

    Args:
        experts: The transformers module with the weights of all experts.
        hidden_states: ``[T, hidden]`` for T tokens.
        top_k_index: ``[T, k]`` indices of the k experts of each token.
        top_k_weights: ``[T, k]`` weights of these experts' outputs.

    Returns:
        ``[T, hidden]`` weighted sums of the experts' outputs.
    """
    num_tokens, k = top_k_index.shape
    num_experts = int(experts.num_experts)  # type: ignore[arg-type]
    size = -(-num_tokens * k // (num_experts * SLICE_STEP)) * SLICE_STEP
    places, counts = _places(top_k_index, num_experts, size)
    owners = [expert for expert, count in enumerate(counts.tolist()) for _ in range(0, count, size)]
    # Nothing holds on to inputs and outputs of slices, which take more memory than the outputs by token and rank.
    outputs = torch.cat(_worked(experts, owners, hidden_states, places, size)).to(hidden_states.dtype)[places]
    return (outputs * top_k_weights[..., None].to(outputs.dtype)).sum(1)


def _places(top_k_index: Tensor, num_experts: int, size: int) -> tuple[Tensor, Tensor]:
    """Lay the tokens of each expert out side by side, in their order, so that every expert begins with a new slice.

    The device is not waited for. Slices begin at multiples of `SLICE_STEP` rows, since products may depend on alignment.

    Returns:
        ``[T, k]`` the row of each token's input to each of its experts, and ``[num_experts]`` numbers of tokens.
    """
    chosen, order = top_k_index.flatten().sort(stable=True)
    experts = torch.arange(num_experts + 1, dtype=chosen.dtype, device=chosen.device)
    counts = torch.searchsorted(chosen, experts).diff()
    padding = -counts % size
    rows = torch.arange(len(chosen), device=chosen.device) + (padding.cumsum(0) - padding)[chosen]
    return torch.empty_like(order).scatter_(0, order, rows).view_as(top_k_index), counts


def _worked(experts: nn.Module, owners: list[int], hidden_states: Tensor, places: Tensor, size: int) -> list[Tensor]:
    """Return the outputs of all slices, ``[size, hidden]`` each; ``owners`` are their experts."""
    inputs = hidden_states.new_zeros(len(owners) * size, hidden_states.shape[1])
    inputs[places] = hidden_states[:, None]
    return [_work(experts, expert, part) for expert, part in zip(owners, inputs.split(size), strict=True)]


def _work(experts: nn.Module, expert: int, inputs: Tensor) -> Tensor:
    if experts.has_gate:
        hidden = experts._apply_gate(_linear(experts, "gate_up_proj", expert, inputs))  # type: ignore[operator]
    else:
        hidden = experts.act_fn(_linear(experts, "up_proj", expert, inputs))  # type: ignore[operator]
    output: Tensor = _linear(experts, "down_proj", expert, hidden)
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output  # type: ignore[operator]


def _linear(experts: nn.Module, name: str, expert: int, inputs: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return product_of(experts)(inputs, weight.T if experts.is_transposed else weight, bias)
