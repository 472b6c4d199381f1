"""Sparse attention of decode rows on the CPU in two phases, against plain attention in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.attention import sparse_decode
from flexgen_helm.attention.decode import PLACES, DecodeAttention, LayerPages
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.attention.sparse_decode import SparseDecode, SparsePlan
from flexgen_helm.kv_cache.page_format import MeanPart, PageFormat, PageTensors
from flexgen_helm.kv_cache.pages import CHUNK_TOKENS, PAGE_TOKENS, Form, PageMap
from flexgen_helm.schedule.rows import Row, Segment
from tests.attention.compressed_reference import largest
from tests.attention.test_decode import HEADS
from tests.attention.test_decode_sealed import BITS, SealedSequences
from tests.attention.test_row import RULES, Heads, Options

Forms = dict[Form, LayerPages]


class SparseSequences(SealedSequences):
    """The same with means, whatever the values are."""

    def __init__(
        self, heads: Heads, lengths: list[int], prefix: int, dtype: torch.dtype, bits: tuple[int, int], percent: int
    ) -> None:
        super().__init__(heads, lengths, prefix, dtype, bits)
        stored, self.percent = self.forms["sealed"].stores["device"], percent
        mean = MeanPart(heads.kv, heads.dim_v, dtype)
        means = torch.randn(len(stored.k), heads.kv, heads.dim_v, generator=torch.Generator().manual_seed(1)).to(dtype)
        form = PageFormat(stored.format.k, stored.format.v, mean)
        self.forms["sealed"] = LayerPages({"device": PageTensors(form, stored.k, stored.v, means)})
        self.means = means.float()

    def plan(self, options: Options, sparse: SparseDecode, chosen: list[int]) -> list[SparsePlan]:
        """The plans of a row with some of the sequences."""
        segments = [Segment((0,), self.lengths[i] - 1, self.tables[i], exact=self.tables[i]) for i in chosen]
        return sparse.plan(
            RowPages(Row("decode", 16, segments), {"exact": PageMap(), "sealed": PageMap()}), RULES[options.rule]
        )

    def attend(self, options: Options, decode: DecodeAttention, only: list[int] | None = None) -> Tensor:
        """What the queries get, in a row with some of the sequences."""
        chosen = list(range(len(self.lengths))) if only is None else only
        sparse = SparseDecode(decode, self.percent)
        return self.finish(sparse, self.plan(options, sparse, chosen), options, chosen)

    def finish(self, sparse: SparseDecode, plans: list[SparsePlan], options: Options, chosen: list[int]) -> Tensor:
        """The same with plans."""
        queries = torch.zeros_like(self.queries)
        queries[: len(chosen)] = self.queries[chosen]
        scale = queries.shape[-1] ** -0.5
        choices = sparse.choose(plans, queries, self.forms, scale=scale, softcap=options.softcap)
        _, den, total = sparse.attend(choices, self.forms)
        assert not total[len(chosen) :].any()
        return total[: len(chosen)] / den[: len(chosen), :, None]

    def expected(self, i: int, options: Options) -> Tensor:
        """The rule of sparse attention for the last token, plainly."""
        n, at = self.lengths[i], torch.arange(self.lengths[i])
        begin = (n - 1) // CHUNK_TOKENS * CHUNK_TOKENS
        k, v = ([self.whole(i, x), self.whole(i, sealed)] for x, sealed in zip(self.stores.tensors, self.sealed, strict=True))
        seen, outputs = RULES[options.rule].allowed(at[-1:, None], at[None])[0], []
        for h, q in enumerate(self.queries[i].double()):
            g = h * k[0].shape[1] // len(self.queries[i])
            keys, values = (torch.cat([x[1][:begin], x[0][begin:]])[:, g].double() for x in (k, v))
            scores = keys @ q * q.shape[0] ** -0.5
            if options.softcap is not None:
                scores = torch.tanh(scores / options.softcap) * options.softcap
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            read = largest(weights[None], (seen & (at < begin))[None], self.percent)[0] | (at >= begin)
            unread = weights.where(~read, 0)[:begin].unflatten(0, (-1, PAGE_TOKENS)).sum(-1)
            means = self.means[self.tables[i][: begin // PAGE_TOKENS], g].double()
            outputs.append(weights.where(read, 0) @ values + unread @ means)
        return torch.stack(outputs)


@settings(derandomize=True, max_examples=15, deadline=None)
@given(
    st.sampled_from([*HEADS, Heads(2, 1, 80, 96), Heads(2, 1, 8, 100)]),
    st.builds(Options, st.sampled_from(sorted(RULES)), st.sampled_from([None, 20.0])),
    st.lists(st.integers(1, 700), min_size=1, max_size=6),
    st.sampled_from([0, 40, 300]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.tuples(BITS, BITS),
    st.sampled_from([1, 10, 60, 99]),
)
def test_queries_read_what_the_rule_says_alone_together_and_in_threads(
    heads: Heads,
    options: Options,
    lengths: list[int],
    prefix: int,
    dtype: torch.dtype,
    bits: tuple[int, int],
    percent: int,
) -> None:
    sequences = SparseSequences(heads, lengths, prefix, dtype, bits, percent)
    one, three = DecodeAttention(1), DecodeAttention(3)
    together = sequences.attend(options, one)
    assert torch.equal(together, sequences.attend(options, three))
    three.close()
    for i in range(len(lengths)):
        assert torch.equal(together[i], sequences.attend(options, one, [i])[0])
        assert (together[i] - sequences.expected(i, options)).abs().max() < 1e-5


def test_queries_whose_scores_are_held_together_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = SparseSequences(HEADS[1], [600, 500, 20, 700], 300, torch.bfloat16, (16, 4), 10)
    together = sequences.attend(Options(), DecodeAttention(1))
    monkeypatch.setattr(sparse_decode, "SCORED_KEYS", 256)
    sparse = SparseDecode(DecodeAttention(1), 10)
    assert [len(group.rows) for group in sequences.plan(Options(), sparse, [0, 1, 2, 3])[0].sealed] == [1, 1, 1]
    assert torch.equal(together, sequences.attend(Options(), DecodeAttention(1)))


def moved(sequences: SparseSequences, plans: list[SparsePlan]) -> tuple[list[SparsePlan], Forms]:
    """Plans and forms with the sealed pages at three places, in another order at each."""
    chance = np.random.default_rng(1)
    stored = sequences.forms["sealed"].stores["device"]
    place, order = chance.integers(0, 3, len(stored.k)), chance.permutation(len(stored.k))
    slots = torch.from_numpy(chance.permutation(len(stored.k)))
    copies = {}
    for name in PLACES:
        index = slots[order] if name == "staged" else torch.from_numpy(order)
        assert stored.mean is not None
        parts = [torch.zeros_like(x).index_copy(0, index, x) for x in (*stored.tensors, stored.mean)]
        copies[name] = PageTensors(stored.format, *parts)
    forms: Forms = {**sequences.forms, "sealed": LayerPages(copies, slots)}
    found = []
    for plan in plans:
        groups = [
            replace(group, chunks=replace(group.chunks, places=place[group.chunks.pages], pages=order[group.chunks.pages]))
            for group in plan.sealed
        ]
        found.append(SparsePlan(groups, plan.exact))
    return found, forms


@pytest.mark.parametrize("bits", [(16, 16), (4, 8)])
@pytest.mark.parametrize("rule", ["causal", "sliding"])
def test_pages_at_other_places_of_which_only_the_chosen_rows_are_there(bits: tuple[int, int], rule: str) -> None:
    sequences = SparseSequences(HEADS[1], [520, 660, 90, 650], 300, torch.float32, bits, 10)
    sparse, everyone = SparseDecode(DecodeAttention(2), 10), [0, 1, 2, 3]
    plans = sequences.plan(Options(rule), sparse, everyone)
    expected = sequences.finish(sparse, plans, Options(rule), everyone)
    plans, forms = moved(sequences, plans)
    scale = sequences.queries.shape[-1] ** -0.5
    queries = torch.zeros_like(sequences.queries)
    queries[:4] = sequences.queries[:4]
    choices = sparse.choose(plans, queries, forms, scale=scale, softcap=None)
    num_read = 0
    for name in PLACES:
        rows = choices.rows_of(name, len(sequences.means))
        read = torch.from_numpy((rows[..., None] >> np.arange(PAGE_TOKENS, dtype=np.uint32) & 1).astype(bool))
        num_read += int(read.sum())
        if name == "staged":
            slots = cast(Tensor, forms["sealed"].slots)
            read = torch.zeros_like(read).index_copy(0, slots, read)
        v = forms["sealed"].stores[name].v
        v[~read] = 255 if v.dtype == torch.uint8 else torch.nan  # scales of 255 are NaN, too
    assert num_read > 0
    _, den, total = sparse.attend(choices, forms)
    assert torch.equal(total[:4] / den[:4, :, None], expected)


def test_a_query_that_is_not_finite_gets_no_number_and_harms_no_other() -> None:
    sequences = SparseSequences(HEADS[1], [300, 250], 0, torch.float32, (16, 16), 10)
    clean = sequences.attend(Options(), DecodeAttention(1))
    for bad in (torch.nan, torch.inf):
        sequences.queries[0, 4, 7] = bad
        found = sequences.attend(Options(), DecodeAttention(1))
        assert torch.equal(found[1], clean[1])
        assert bool(found[0, 4].isnan().all())
