"""How a cache stores K and V, and what attention reads of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexgen_helm.kv_cache.flexgen_format import FlexGenPart
from flexgen_helm.kv_cache.page_format import MeanPart, PageFormat, PartFormat
from flexgen_helm.kv_cache.pages import Form
from flexgen_helm.kv_cache.sealed_format import NOT_QUANTIZED, sealed_format


@dataclass(frozen=True)
class CacheFormat:
    """What is stored and read of K and V."""

    k_bits: int = NOT_QUANTIZED
    """Bits of a code of K: 2, 4, 8; or 16: K is not quantised."""
    v_bits: int = NOT_QUANTIZED
    """Bits of a code of V, likewise."""
    sparsity: int | None = None
    """Per cent of the keys of which V is read; None: all."""
    flexgen: bool = False
    """Whether FlexGen's rules hold: each token is quantised as it is written, and only a query's own token is exact."""

    @property
    def quantizes(self) -> bool:
        """Whether K or V are quantised."""
        return min(self.k_bits, self.v_bits) < NOT_QUANTIZED

    @property
    def seals(self) -> bool:
        """Whether earlier chunks are read in another form than a query's own."""
        return not self.flexgen and (self.quantizes or self.sparsity is not None)

    @property
    def is_plain(self) -> bool:
        """Whether attention reads all of K and V as they are."""
        return not self.quantizes and self.sparsity is None

    @property
    def name(self) -> str:
        """Bits of K and V, such as "kv4" or "k8v4"; "" where they are not quantised."""
        if not self.quantizes:
            return ""
        return f"kv{self.k_bits}" if self.k_bits == self.v_bits else f"k{self.k_bits}v{self.v_bits}"

    def forms(self, k: Tensor, v: Tensor) -> dict[Form, PageFormat]:
        """Return the forms of the pages of an attention call, for K and V like ``k`` and ``v`` ``[T, num_heads, dim]``."""
        exact = PageFormat.plain(k, v)
        if self.flexgen:
            return {"exact": PageFormat(_flexgen(exact.k, self.k_bits), _flexgen(exact.v, self.v_bits))}
        if not self.seals:
            return {"exact": exact}
        sealed = sealed_format(exact, k_bits=self.k_bits, v_bits=self.v_bits)
        mean = None if self.sparsity is None else MeanPart(exact.v.num_heads, exact.v.dim, exact.v.dtype)
        return {"exact": exact, "sealed": PageFormat(sealed.k, sealed.v, mean)}


PLAIN_CACHE = CacheFormat()
"""K and V as they are."""


def _flexgen(part: PartFormat, bits: int) -> PartFormat:
    return part if bits == NOT_QUANTIZED else FlexGenPart(part.num_heads, part.dim, part.dtype, bits)
