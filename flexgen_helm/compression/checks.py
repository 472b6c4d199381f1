"""Weights that no quantizer can store."""

from __future__ import annotations

import math

from torch import Tensor

from flexgen_helm.errors import UnsupportedModel


def require_quantizable(weight: Tensor, scheme: str, most: float | None = None) -> None:
    """Check that a weight can be quantised.

    Args:
        weight: ``[out, in]``.
        scheme: Name of the quantizer, for the message.
        most: Largest magnitude that it can store; None: any finite number.

    Raises:
        UnsupportedModel: If a number is NaN or infinite, or larger.
    """
    low, high = (float(x) for x in weight.aminmax()) if weight.numel() else (0.0, 0.0)
    finite = math.isfinite(low) and math.isfinite(high)
    if not finite or (most is not None and max(-low, high) > most):
        bad, problem = ~weight.isfinite(), "NaN or infinite"
        if most is not None and finite:
            bad, problem = weight.abs() > most, f"larger than {most:g}, which its float16 scales cannot hold"
        row, column = (int(x) for x in bad.nonzero()[0])
        raise UnsupportedModel(
            f"A weight of {weight.shape[0]} x {weight.shape[1]} cannot be quantised by {scheme}, because {int(bad.sum())} "
            f"of its numbers are {problem}: the first is {weight[row, column].item():g} in row {row}, column {column}. Check "
            "the checkpoint, which may be damaged, or evaluate the model without compressed weights."
        )
