"""Launch of the kernel: where the pages of a layer are, and what shape tiles have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from flexgen_helm.attention.locate import Locate
from flexgen_helm.attention.paged.kernel import attend_tiles
from flexgen_helm.attention.paged.plan import PLACES, TilePlan
from flexgen_helm.attention.writes import Stores
from flexgen_helm.kv_cache.coded_part import CodedPart
from flexgen_helm.kv_cache.page_format import PageFormat, PartFormat
from flexgen_helm.kv_cache.pages import Form
from flexgen_helm.kv_cache.sealed_format import NOT_QUANTIZED

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LEAST_ROWS = 16
"""Rows of the smallest product of matrix units."""


def attend_row(  # noqa: PLR0913 - what the model gives, and what the cache has
    plan: TilePlan,
    q: Tensor,
    stores: Stores,
    locate: Locate,
    forms: Mapping[Form, PageFormat],
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend with all queries of a row.

    Args:
        plan: The row's tiles.
        q: Queries ``[T, H, D]``.
        stores: The layer's pages by form and place.
        locate: Finds the slots of staged pages.
        forms: Forms of pages that the cache has. The kernel is compiled for them, whatever pages the row has, so that its bits
            do not depend on neighbours.
        scale: Factor of the scores.
        softcap: See `flexgen_helm.attention.kernels.attend_chunk`.
        sinks: ``[H]`` logits of an attention sink, or None.

    Returns:
        ``[T, H, Dv]`` in the dtype of the values, zeros for queries that attend to nothing.
    """
    exact = forms["exact"]
    sealed = forms.get("sealed", exact)
    num_heads, num_kv = q.shape[1], exact.k.num_heads
    outputs = torch.zeros(len(q), num_heads, exact.v.dim, dtype=exact.v.dtype, device=q.device)
    attend_tiles[(plan.num_tiles, num_kv)](
        q.contiguous(),
        outputs,
        plan.nothing if sinks is None else sinks,
        *(plan.tiles, plan.visits, plan.masks),
        *(locate.slots.get(form, plan.nothing) for form in ("exact", "sealed")),
        *_addresses(stores, "exact"),
        *_addresses(stores, "sealed"),
        *(exact.k.num_bytes, exact.v.num_bytes, sealed.k.num_bytes, sealed.v.num_bytes),
        *(scale, softcap or 1.0),
        **constants(plan.size, num_heads, exact, sealed),
        HAS_SEALED="sealed" in forms,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        num_warps=num_warps(plan.size, exact.k.dtype),
        enable_fp_fusion=True,  # stated, since the default differs between versions of Triton
    )
    return outputs


def constants(size: int, num_heads: int, exact: PageFormat, sealed: PageFormat) -> dict[str, Any]:
    """Return what the kernel is compiled for, besides the options of a family.

    Args:
        size: Queries of a tile.
        num_heads: Query heads.
        exact: Form of exact pages.
        sealed: Form of sealed pages; where there are none, that of exact ones.
    """
    sharing, dim, dim_v = num_heads // exact.k.num_heads, exact.k.dim, exact.v.dim
    return {
        "HEADS": num_heads,
        "SHARING": sharing,
        "SIZE": size,
        "ROWS": max(LEAST_ROWS, triton.next_power_of_2(size * sharing)),
        "DIM": dim,
        "DIM_V": dim_v,
        "WIDE": max(LEAST_ROWS, triton.next_power_of_2(dim)),
        "WIDE_V": max(LEAST_ROWS, triton.next_power_of_2(dim_v)),
        "K_BITS": _bits(sealed.k),
        "V_BITS": _bits(sealed.v),
        "DTYPE": DTYPES[exact.k.dtype],
    }


def num_warps(size: int, dtype: torch.dtype) -> int:
    """Return the warps of a program: 8 for a tile of prompts in 16 bits, whose sums would not fit into the registers of 4."""
    return 8 if size > 1 and dtype.itemsize < 4 else 4


def _bits(part: PartFormat) -> int:
    return part.bits if isinstance(part, CodedPart) else NOT_QUANTIZED


def _addresses(stores: Stores, form: Form) -> list[int]:
    """Where the pages of each place begin, K of all places, then V; 0 where there are none."""
    found = stores.get(form, {})
    return [found[place].tensors[part].data_ptr() if place in found else 0 for part in range(2) for place in PLACES]
