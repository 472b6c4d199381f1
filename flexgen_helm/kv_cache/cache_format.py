"""The forms of a cache's pages: exact ones, and the sealed ones that take their place once a chunk is computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexgen_helm.kv_cache.page_format import PageFormat
from flexgen_helm.kv_cache.pages import Form
from flexgen_helm.kv_cache.sealed_format import NOT_QUANTIZED, sealed_format


@dataclass(frozen=True)
class CacheFormat:
    """How K and V are stored."""

    k_bits: int = NOT_QUANTIZED
    """Bits of a code of K: 2, 4, 8; or 16: K is not quantised."""
    v_bits: int = NOT_QUANTIZED
    """Bits of a code of V, likewise."""

    @property
    def seals(self) -> bool:
        """Whether there are sealed pages."""
        return min(self.k_bits, self.v_bits) < NOT_QUANTIZED

    def forms(self, k: Tensor, v: Tensor) -> dict[Form, PageFormat]:
        """Return the forms of the pages of an attention call, for K and V like ``k`` and ``v`` ``[T, num_heads, dim]``."""
        exact = PageFormat.plain(k, v)
        if not self.seals:
            return {"exact": exact}
        return {"exact": exact, "sealed": sealed_format(exact, k_bits=self.k_bits, v_bits=self.v_bits)}


PLAIN_CACHE = CacheFormat()
"""K and V as they are."""
