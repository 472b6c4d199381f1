"""Counts of sequences against bytes added up by hand."""

from __future__ import annotations

import pytest

from flexgen_helm.kv_cache.cache_format import PLAIN_CACHE, CacheFormat
from flexgen_helm.runs.cache_capacity.__main__ import HEAD_DIM, NUM_HEADS, NUM_LAYERS, admitted

NUMBERS = NUM_LAYERS * NUM_HEADS * HEAD_DIM * 32
"""Numbers of K, or of V, in a page of 32 tokens."""
PLAIN = 2 * 2 * NUMBERS


@pytest.mark.parametrize("tokens", [544, 2000])
def test_uncompressed_sequences_take_whole_pages(tokens: int) -> None:
    found, page_bytes = admitted(1 << 30, tokens, PLAIN_CACHE)
    assert page_bytes == PLAIN
    own = -(-(tokens - 1) // 32)  # the last token is never attended to
    assert found == (1 << 30) // PLAIN // own


@pytest.mark.parametrize(("tokens", "exact"), [(544, 1), (2000, 2 + 2)])
def test_compressed_sequences_take_exact_pages_beside_sealed_ones(tokens: int, exact: int) -> None:
    """Prompts of 512 and 1,968 tokens: the second ends in the second page of its chunk; 31 more tokens lie in one and two."""
    found, page_bytes = admitted(1 << 30, tokens, CacheFormat(4, 4))
    assert page_bytes == NUMBERS * (4 + 1 + 4 + 0.5) / 8  # two numbers of 16 bits for 32 tokens, and for 64 numbers
    each = -(-(tokens - 1) // 32) * page_bytes + exact * PLAIN
    assert found == pytest.approx(((1 << 30) - 8 * PLAIN) / each, abs=2)
