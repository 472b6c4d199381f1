"""FlexGen's form of K and V, for comparison: each token is quantised as it is written, in groups of 64 within a head.

Numbers are those of FlexGen's CPU code, as in `flexgen_helm.compression.minmax`. In float32 are computed
``scale = (2**bits - 1) / (max - min)``, at most the largest float16, and ``code = round((x - min) * scale)``. Then scale and
minimum are rounded to float16. The value is ``code / scale + min``, and ``min`` where the scale is 0, as in empty pages.
FlexGen computes in float16. Of other dtypes, numbers beyond 64256 count as that, so that no value overflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexgen_helm.kv_cache.coded_part import TokenRowsPart
from flexgen_helm.kv_cache.minmax import LARGEST_HALF
from flexgen_helm.kv_cache.page_format import TokenPlaces, copy_tokens

LARGEST_SCALE = 65504.0


@dataclass(frozen=True)
class FlexGenPart(TokenRowsPart):
    """K or V: uint8 ``[pages, num_heads, 32, bytes]``, a `TokenRow` for each token: float16 scale and minimum, then codes."""

    flexgen: ClassVar[bool] = True

    def write(self, stored: Tensor, pages: Tensor, tokens: Tensor, new: Tensor) -> None:
        """Quantise tokens ``[n, num_heads, dim]`` where they are, and store them."""
        stored[pages, :, tokens] = self.encode(new).to(stored.device)

    def read(self, stored: Tensor, pages: Tensor, tokens: Tensor) -> Tensor:
        """The values of the tokens ``[n, num_heads, dim]`` at some places."""
        return self.decode(stored[pages, :, tokens]).to(self.dtype)

    def copy(self, source: TokenPlaces, target: TokenPlaces) -> None:
        """Copy tokens as they are stored; quantised again, some would change."""
        copy_tokens(source, target)

    def encode(self, tokens: Tensor) -> Tensor:
        """Return the bytes of tokens ``[..., dim]``: uint8 ``[..., row.num_bytes]``."""
        x, most = self.row.groups(tokens.float().clamp(-LARGEST_HALF, LARGEST_HALF)), 2**self.bits - 1
        minimum, maximum = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = (most / (maximum - minimum)).clamp(max=LARGEST_SCALE)
        codes = ((x - minimum) * scale).round_().clamp_(0, most).to(torch.uint8)
        return self.row.join(codes, torch.cat([scale, minimum], -1).half())

    def decode(self, tokens: Tensor) -> Tensor:
        """Dequantise tokens ``[..., row.num_bytes]`` by torch: float32 ``[..., dim]``."""
        codes, numbers = self.row.split(tokens, torch.float16)
        scale, minimum = numbers.float().unbind(-1)
        return codes.float() / torch.where(scale > 0, scale, 1) + minimum
