"""Decode rows on the CPU over sealed pages: codes are read as NumPy reads them, and attention is that of the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor

from flexgen_helm.attention.decode import DecodeAttention, DecodePlan, LayerPages
from flexgen_helm.attention.decode_codes import unpack_keys, unpack_values
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.attention.visits import row_visits
from flexgen_helm.kv_cache.page_format import PageTensors, PartFormat
from flexgen_helm.kv_cache.pages import CHUNK_TOKENS, PAGE_TOKENS, PageMap
from flexgen_helm.kv_cache.sealed_format import NOT_QUANTIZED, sealed_format
from flexgen_helm.schedule.rows import Row, Segment
from tests.attention.test_decode import HEADS, Sequences
from tests.attention.test_row import RULES, Heads, Options, dense

Array = np.ndarray[Any, Any]
RandomPages = Callable[[np.random.Generator, int, int, int, int], tuple[Array, Array]]


def factors(chance: np.random.Generator, bits: int, *shape: int) -> tuple[Array, Array]:
    """Random scales and zeros ``[*shape, 2]`` that give values about 1: their bytes as bfloat16, and themselves."""
    x = torch.from_numpy(chance.standard_normal((*shape, 2)) * [2.0**-bits, 1.0]).to(torch.bfloat16)
    return x.view(torch.uint8).numpy(), x.float().numpy()


def pack(codes: Array, bits: int) -> Array:
    """Codes ``[..., n]`` in bytes ``[..., ceil(n * bits / 8)]``, one by one."""
    packed = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] * bits // 8)), np.uint8)
    for i in range(codes.shape[-1]):
        packed[..., i * bits // 8] |= codes[..., i] << (i * bits % 8)
    return packed


def random_keys(chance: np.random.Generator, pages: int, heads: int, dim: int, bits: int) -> tuple[Array, Array]:
    """Random sealed K ``[pages, heads, bytes]``, and its values ``[pages, heads, 32, dim]``."""
    stored, values = factors(chance, bits, pages, heads, dim)
    codes = chance.integers(0, 2**bits, (pages, heads, dim, PAGE_TOKENS), np.uint8)
    both = [stored.reshape(pages, heads, -1), pack(codes, bits).reshape(pages, heads, -1)]
    found = codes.astype(np.float32) * values[..., :1] + values[..., 1:]
    return np.concatenate(both, -1), found.swapaxes(-1, -2)


def random_values(chance: np.random.Generator, pages: int, heads: int, dim: int, bits: int) -> tuple[Array, Array]:
    """Random sealed V ``[pages, heads, 32, bytes]``, and its values ``[pages, heads, 32, dim]``."""
    shape = pages, heads, PAGE_TOKENS
    stored, values = factors(chance, bits, *shape, -(-dim // 64))
    codes = chance.integers(0, 2**bits, (*shape, dim), np.uint8)
    row = np.concatenate([stored.reshape(*shape, -1), pack(codes, bits)], -1)
    scale, zero = (np.repeat(values[..., i], 64, -1)[..., :dim] for i in (0, 1))
    return np.pad(row, [(0, 0)] * 3 + [(0, row.shape[-1] % 2)]), codes.astype(np.float32) * scale + zero


@njit
def _unpacked_keys(address, bits, dim, out):  # type: ignore[no-untyped-def]
    unpack_keys(address, bits, dim, out)


@njit
def _unpacked_values(address, bits, dim, out):  # type: ignore[no-untyped-def]
    unpack_values(address, bits, dim, out)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.sampled_from([2, 4, 8]))
def test_codes_are_read_with_the_two_roundings_of_fp32(dim: int, bits: int) -> None:
    chance = np.random.default_rng(dim)
    found = np.empty(dim * PAGE_TOKENS, np.float32)
    stored, keys = random_keys(chance, 1, 1, dim, bits)
    _unpacked_keys(stored.ctypes.data, bits, dim, found)
    np.testing.assert_array_equal(found.reshape(dim, PAGE_TOKENS).T, keys[0, 0])
    stored, values = random_values(chance, 1, 1, dim, bits)
    _unpacked_values(stored.ctypes.data, bits, dim, found)
    np.testing.assert_array_equal(found.reshape(PAGE_TOKENS, dim), values[0, 0])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_of_zero_are_zeros(bits: int) -> None:
    stored, found = np.zeros(72 * 36, np.uint8), np.empty(72 * PAGE_TOKENS, np.float32)
    for read in (_unpacked_keys, _unpacked_values):
        found[:] = 1
        read(stored.ctypes.data, bits, 72, found)
        assert not found.any()


class SealedSequences(Sequences):
    """Sequences with codes in every page, next to exact numbers that differ from them."""

    def __init__(self, heads: Heads, lengths: list[int], prefix: int, dtype: torch.dtype, bits: tuple[int, int]) -> None:
        super().__init__(heads, lengths, prefix, dtype)
        chance = np.random.default_rng(sum(lengths))
        form = sealed_format(self.stores.format, k_bits=bits[0], v_bits=bits[1])
        pages = len(self.stores.k)
        k, keys = self._part(random_keys, chance, pages, form.k, bits[0])
        v, values = self._part(random_values, chance, pages, form.v, bits[1])
        self.forms["sealed"] = LayerPages({"device": PageTensors(form, k, v)})
        self.sealed = [keys, values]

    @staticmethod
    def _part(
        random: RandomPages, chance: np.random.Generator, pages: int, form: PartFormat, bits: int
    ) -> tuple[Tensor, Tensor]:
        if bits == NOT_QUANTIZED:
            shape = pages, form.num_heads, PAGE_TOKENS, form.dim
            stored = torch.from_numpy(chance.standard_normal(shape)).to(form.dtype)
            return stored, stored.float()
        stored, values = (
            torch.from_numpy(np.ascontiguousarray(x)) for x in random(chance, pages, form.num_heads, form.dim, bits)
        )
        return stored, values

    def expected(self, i: int, options: Options) -> Tensor:
        """Plain attention with the values of the codes in all chunks before the last token's."""
        n = self.lengths[i]
        k, v = (self.whole(i, x) for x in self.stores.tensors)
        begin = (n - 1) // CHUNK_TOKENS * CHUNK_TOKENS
        for exact, sealed in zip((k, v), self.sealed, strict=True):
            exact[:begin] = self.whole(i, sealed)[:begin]
        q = torch.zeros(n, *self.queries.shape[1:])
        q[-1] = self.queries[i]
        return dense(q, k, v, options, None)[-1]


BITS = st.sampled_from([2, 4, 8, NOT_QUANTIZED])


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    st.sampled_from([*HEADS, Heads(2, 1, 80, 96)]),
    st.builds(Options, st.sampled_from(sorted(RULES)), st.sampled_from([None, 20.0])),
    st.lists(st.integers(1, 700), min_size=1, max_size=6),
    st.sampled_from([0, 40, 300]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.tuples(BITS, BITS),
)
def test_earlier_chunks_are_sealed_and_the_own_is_exact(
    heads: Heads, options: Options, lengths: list[int], prefix: int, dtype: torch.dtype, bits: tuple[int, int]
) -> None:
    sequences = SealedSequences(heads, lengths, prefix, dtype, bits)
    one, three = DecodeAttention(1), DecodeAttention(3)
    together = sequences.attend(options, one)
    assert torch.equal(together, sequences.attend(options, three))
    three.close()
    for i in range(len(lengths)):
        assert torch.equal(together[i], sequences.attend(options, one, [i])[0])
        assert (together[i] - sequences.expected(i, options)).abs().max() < 1e-5


def test_one_chunk_is_exact_for_its_own_query_and_sealed_for_a_later_one() -> None:
    tables = [[0, 1, 2, 3], [0, 1, 2, 3, 4]]
    row = Row("decode", 16, [Segment((0,), n - 1, table, exact=table) for n, table in zip((128, 130), tables, strict=True)])
    pages = RowPages(row, {"exact": PageMap(), "sealed": PageMap()})
    plan = DecodePlan.of(pages, RULES["causal"], list(row_visits(row)))
    assert plan.sealed.tolist() == [False, True, False]
    assert plan.rows.tolist() == [0, 1, 1]
    row = Row("decode", 16, [Segment((0,), n - 1, table) for n, table in zip((128, 130), tables, strict=True)])
    plan = DecodePlan.of(RowPages(row, {"exact": PageMap()}), RULES["causal"], list(row_visits(row)))
    assert plan.sealed.tolist() == [False, False]
