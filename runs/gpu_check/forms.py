"""Whether the same rows have the same bits in products of other forms: what equal answers alone and together need on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from flexgen_helm.machine.rates import random_numbers
from flexgen_helm.runs.gpu_check.sizes import Sizes
from flexgen_helm.runtime.precise_products import PRECISE_PRODUCTS

KEYS = 128
"""Keys of a chunk."""
MESSAGE = 150
"""Characters of an error that are shown."""
ROWS = 16
"""Rows that are compared."""
Forms = Iterator[tuple[str, Callable[[], Tensor]]]
"""Names of forms, and functions that compute the rows in them; the first is what the others are compared with."""


def compare_forms(sizes: Sizes) -> dict[str, Any]:
    """Compare the rows of a product alone with the same rows in other forms, for each kind of product of the engine."""
    kinds = {
        "scores, fp32": partial(_attention, sizes, scores=True),
        "values, fp32": partial(_attention, sizes, scores=False),
        "linear, bf16": partial(_linear, sizes, torch.bfloat16),
        "linear, fp32": partial(_linear, sizes, torch.float32),
        "varlen_attn, one split": partial(_varlen, sizes),
    }
    with torch.inference_mode(), PRECISE_PRODUCTS.hold():
        return {name: _compared(forms()) for name, forms in kinds.items()}


def _compared(forms: Forms) -> dict[str, Any]:
    """Count the forms that give the bits of the first one, or say why there are none."""
    try:
        (_, first), *others = forms
        expected = first()
        found = {name: compute() for name, compute in others}
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        return {"missing": f"{type(error).__name__}: {str(error)[:MESSAGE]}"}
    different = {name: float((rows.double() - expected.double()).abs().max()) for name, rows in found.items()}
    different = {name: worst for name, worst in different.items() if not torch.equal(found[name], expected)}
    return {
        "forms": len(found),
        "with other bits": len(different),
        "largest difference": max(different.values(), default=0.0),
        "which": ", ".join(different),
    }


def _attention(sizes: Sizes, *, scores: bool) -> Forms:
    """Yield one of both products of attention by hand, for a sequence among B with M queries each."""
    device, heads, dim = sizes.torch_device, sizes.num_heads, sizes.head_dim
    left = random_numbers((max(sizes.batches), heads, max(sizes.queries), dim if scores else KEYS), device, torch.float32)
    right = random_numbers((max(sizes.batches), heads, KEYS, dim), device, torch.float32)
    right = right.transpose(2, 3) if scores else right
    for count in sizes.batches:
        for queries in sizes.queries:

            def compute(count: int = count, queries: int = queries) -> Tensor:
                # as the engine has it: the queries of a batch are one stretch
                return (left[:count, :, :queries].contiguous() @ right[:count])[0, :, :ROWS]

            yield f"B {count} M {queries}", compute


def _linear(sizes: Sizes, dtype: torch.dtype) -> Forms:
    """Yield a linear layer with bias."""
    x = random_numbers((max(sizes.tokens), sizes.width), sizes.torch_device, dtype)
    weight = random_numbers((sizes.width, sizes.width), sizes.torch_device, dtype)
    for tokens in sizes.tokens:

        def compute(tokens: int = tokens) -> Tensor:
            return linear(x[:tokens], weight, weight[0])[:ROWS]

        yield f"{tokens} tokens", compute


def _varlen(sizes: Sizes) -> Forms:
    """Yield the last queries of a sequence in torch's fused kernel: alone, among others, and as the end of longer prompts."""
    from torch.nn.attention.varlen import varlen_attn

    device, keys = sizes.torch_device, sizes.num_chunks * KEYS
    count = max(sizes.batches)
    shape = (count * keys, sizes.num_heads, sizes.head_dim)
    q, k, v = (random_numbers(shape, device, torch.bfloat16).roll(shift, 0) for shift in range(3))
    for batch in sizes.batches:
        for queries in (ROWS, *(each for each in sizes.queries if ROWS < each <= keys)):

            def compute(batch: int = batch, queries: int = queries) -> Tensor:
                last = q[: batch * keys].view(batch, keys, *shape[1:])[:, keys - queries :].flatten(0, 1).contiguous()
                steps = torch.arange(batch + 1, dtype=torch.int32, device=device)
                rows = varlen_attn(
                    last,
                    k[: batch * keys],
                    v[: batch * keys],
                    cu_seq_q=steps * queries,
                    cu_seq_k=steps * keys,
                    max_q=queries,
                    max_k=keys,
                    window_size=(-1, 0),
                    num_splits=1,
                )
                assert isinstance(rows, Tensor)
                return rows[queries - ROWS : queries]

            yield f"B {batch} M {queries}", compute
