"""Decode rows on the CPU: stored forms, threads, and masks, against plain attention in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor

from flexgen_helm.attention.decode import KINDS, DecodeAttention, DecodePlan, LayerPages
from flexgen_helm.attention.decode_intrinsics import multiply_add
from flexgen_helm.attention.decode_kernel import _transpose, load_stored, powers_of_two
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.attention.visits import row_visits
from flexgen_helm.kv_cache.page_format import PageFormat, PageTensors
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, Form, PageMap
from flexgen_helm.schedule.rows import Row, Segment
from tests.attention.test_row import RULES, Heads, Options, dense

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_every_finite_number_of_16_bits_is_read_as_torch_reads_it() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    for dtype in (torch.bfloat16, torch.float16):
        found = np.empty(len(patterns), np.float32)
        load_stored(patterns.ctypes.data, KINDS[dtype], found, found.view(np.uint32))
        expected = torch.from_numpy(patterns).view(dtype).float()
        finite = expected.isfinite()
        assert int(finite.sum()) > 2**15
        assert torch.equal(torch.from_numpy(found)[finite], expected[finite])


@pytest.mark.parametrize("dim", [1, 15, 16, 64, 72])
def test_a_page_is_transposed(dim: int) -> None:
    rows, columns = np.arange(PAGE_TOKENS * dim, dtype=np.float32), np.empty(PAGE_TOKENS * dim, np.float32)
    _transpose(rows, columns)
    np.testing.assert_array_equal(columns.reshape(dim, PAGE_TOKENS), rows.reshape(PAGE_TOKENS, dim).T)


@given(st.integers(1, 9), st.integers(1, 80), st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_rows_of_a_product_have_the_same_bits_alone_and_together(num_rows: int, m: int, n: int) -> None:
    chance = np.random.default_rng(n)
    a, b = (chance.standard_normal(shape).astype(np.float32) for shape in ((num_rows, n), (n, m)))
    before = chance.standard_normal((num_rows, m)).astype(np.float32)
    together, alone = before.copy(), before.copy()
    a_at, c_at = np.arange(num_rows) * n, np.arange(num_rows) * m
    _multiply_add(a.ravel(), a_at, b.ravel(), m, n, together.reshape(-1), c_at, num_rows)
    for r in range(num_rows):
        _multiply_add(a.ravel(), a_at[r : r + 1], b.ravel(), m, n, alone.reshape(-1), c_at[r : r + 1], 1)
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(together, before + a.astype(np.float64) @ b, atol=1e-4)


@njit
def _multiply_add(a, a_at, b, m, n, c, c_at, num_rows):  # type: ignore[no-untyped-def]
    multiply_add(a, a_at, b, np.uint64(m), np.uint64(n), c, c_at, np.uint64(num_rows))


def test_powers_of_two_are_as_exact_as_fp32_and_what_is_hidden_vanishes() -> None:
    x = np.concatenate([np.linspace(-126, 0, 4093), [-1000.0, -np.inf, np.nan]]).astype(np.float32)
    found = x.copy()
    powers_of_two(found, np.empty(len(x), np.int32))
    np.testing.assert_allclose(found[:-3], 2 ** x[:-3].astype(np.float64), rtol=3e-7)
    np.testing.assert_array_equal(found[-3:], [0, 0, np.nan])


class Sequences:
    """Sequences of which the last tokens are decoded, with a common prefix of whole pages."""

    def __init__(self, heads: Heads, lengths: list[int], prefix: int, dtype: torch.dtype) -> None:
        chance = torch.Generator().manual_seed(sum(lengths))
        longest = max(lengths)
        shared = min(prefix, min(lengths) - 1) // PAGE_TOKENS
        count = -(-longest // PAGE_TOKENS)
        self.tables = [[*range(shared), *range(shared + i * count, shared + (i + 1) * count)] for i in range(len(lengths))]
        num_pages = max(map(max, self.tables)) + 1
        k, v = (torch.randn(num_pages, heads.kv, PAGE_TOKENS, d, generator=chance).to(dtype) for d in (heads.dim, heads.dim_v))
        self.stores = PageTensors(PageFormat.plain(*(x[0].transpose(0, 1) for x in (k, v))), k, v)
        self.forms: dict[Form, LayerPages] = {"exact": LayerPages({"device": self.stores})}
        self.queries = torch.randn(16, heads.q, heads.dim, generator=chance)
        self.lengths = lengths

    def attend(self, options: Options, decode: DecodeAttention, only: list[int] | None = None) -> Tensor:
        """What the queries get, in a row with some of the sequences."""
        chosen = range(len(self.lengths)) if only is None else only
        tables = [(table, table if "sealed" in self.forms else None) for table in self.tables]
        row = Row("decode", 16, [Segment((0,), self.lengths[i] - 1, tables[i][0], exact=tables[i][1]) for i in chosen])
        pages = RowPages(row, {form: PageMap() for form in self.forms})
        queries = torch.zeros_like(self.queries)
        queries[: len(chosen)] = self.queries[chosen]
        scale = queries.shape[-1] ** -0.5
        plans = decode.plan(pages, RULES[options.rule])
        _, den, total = decode.attend(plans, queries, self.forms, scale=scale, softcap=options.softcap)
        assert not total[len(chosen) :].any()
        return total[: len(chosen)] / den[: len(chosen), :, None]

    def whole(self, i: int, pages: Tensor) -> Tensor:
        """K or V of a sequence, ``[T, H_kv, D]``, from ``[pages, H_kv, 32, D]``."""
        return pages[self.tables[i]].transpose(1, 2).flatten(0, 1)[: self.lengths[i]].float()

    def expected(self, i: int, options: Options) -> Tensor:
        """The same by plain attention."""
        n = self.lengths[i]
        k, v = (self.whole(i, x) for x in self.stores.tensors)
        q = torch.zeros(n, *self.queries.shape[1:])
        q[-1] = self.queries[i]
        return dense(q, k, v, options, None)[-1]


HEADS = [Heads(4, 4, 16, 16), Heads(9, 3, 64, 64), Heads(3, 1, 20, 32), Heads(2, 2, 128, 64)]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.sampled_from(HEADS),
    st.builds(Options, st.sampled_from(sorted(RULES)), st.sampled_from([None, 20.0])),
    st.lists(st.integers(1, 700), min_size=1, max_size=16),
    st.sampled_from([0, 40, 300]),
    st.sampled_from(DTYPES),
)
def test_decode_equals_dense_attention_alone_together_and_in_threads(
    heads: Heads, options: Options, lengths: list[int], prefix: int, dtype: torch.dtype
) -> None:
    sequences = Sequences(heads, lengths, prefix, dtype)
    one, three = DecodeAttention(1), DecodeAttention(3)
    together = sequences.attend(options, one)
    assert torch.equal(together, sequences.attend(options, three))
    three.close()
    for i in range(len(lengths)):
        assert torch.equal(together[i], sequences.attend(options, one, [i])[0])
        assert (together[i] - sequences.expected(i, options)).abs().max() < 5e-6


def test_a_chunk_of_many_is_met_once() -> None:
    sequences = Sequences(HEADS[0], [300, 290, 400], 260, torch.float32)
    row = Row("decode", 16, [Segment((0,), n - 1, table) for n, table in zip(sequences.lengths, sequences.tables, strict=True)])
    pages = RowPages(row, {"exact": PageMap()})
    plan = DecodePlan.of(pages, RULES["causal"], list(row_visits(row)))
    assert plan.begins.tolist() == [0, 3, 6, 7, 8, 9, 10]  # two shared chunks, the third of each sequence, a fourth of one
    assert plan.visible.tolist() == [128] * 6 + [44, 34, 128, 16]


def test_a_query_that_is_not_finite_gets_no_number_and_harms_no_other() -> None:
    sequences = Sequences(HEADS[1], [200, 150], 0, torch.float32)
    clean = sequences.attend(Options(), DecodeAttention(1))
    sequences.queries[0, 4, 7] = torch.nan
    found = sequences.attend(Options(), DecodeAttention(1))
    assert torch.equal(found[1], clean[1])
    assert bool(found[0, 4].isnan().all())
