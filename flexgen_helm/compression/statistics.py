"""What a quantizer knows of the inputs of a matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ColumnStatistics:
    """Mean square of each input of a linear layer, over the tokens that it saw: the diagonal of GPTQ's H (arXiv 2210.17323)."""

    num_inputs: int
    """Columns of the matrix."""
    num_tokens: int = 0
    """Tokens seen so far."""
    total: Tensor = field(init=False)
    """float64 ``[num_inputs]``: sums of squares."""

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.num_inputs, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """Count some tokens.

        Args:
            inputs: ``[tokens, num_inputs]`` of any dtype, on any device. Squares are taken in float32 and added in float64.
        """
        self.total += inputs.float().square().sum(0, dtype=torch.float64).cpu()
        self.num_tokens += len(inputs)

    @property
    def moment(self) -> Tensor:
        """float32 ``[num_inputs]``: mean squares. Ones where no token was seen, as of a fused expert that no token chose."""
        return (self.total / self.num_tokens).float() if self.num_tokens else torch.ones(self.num_inputs)
