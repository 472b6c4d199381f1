"""Attention of rows whose pages rest on other tiers: the bits of rows whose pages are all on the device."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen_helm.attention.places import RowPages
from flexgen_helm.attention.row import RowAttention
from flexgen_helm.memory.cache import PagedCache
from flexgen_helm.memory.page_tensors import CacheKey
from flexgen_helm.memory.pages import PagePool, num_pages
from flexgen_helm.schedule.rows import Row, Segment
from tests.attention.test_row import RULES, Heads, Machine, Options, RowKind, dense, num_shared, random_rows

CPU = torch.device("cpu")
NUM_LAYERS = 2
Pieces = list[tuple[int, int, int]]


class TieredMachine(Machine):
    """The sequences of `Machine` in pages of a pool, several layers, each row loaded before the one before it attends."""

    def __init__(
        self, heads: Heads, options: Options, lengths: list[int], prefix: int, pool: PagePool, **cache: object
    ) -> None:
        super().__init__(heads, options, lengths, prefix)
        self.cache = PagedCache(pool, **cache)  # type: ignore[arg-type]
        shared = num_shared(lengths, prefix)
        first = pool.allocate(num_pages(0, lengths[0]))
        self.tables = [first] + [first[:shared] + pool.allocate(num_pages(0, n) - shared) for n in lengths[1:]]
        self.pool = pool
        self.layers = [[output.clone() for output in self.outputs] for _ in range(NUM_LAYERS)]

    def sweep(self, rows: list[tuple[RowKind, int, Pieces]], *, ahead: bool = True) -> None:
        """Run rows through all layers, column by column."""
        made = [self._row(*row) for row in rows]
        staged = 2 * max(len(RowPages(row, self.cache).staged.pages) for row in made)
        high = self.pool.high_water
        self.cache.reserve(kept=high.device, host=high.host, transient=0, staged=staged)
        attentions = [RowAttention(row, self.cache, CPU) for row in made]
        squares = [(j, k) for j in range(NUM_LAYERS) for k in range(len(rows))]
        for square, following in zip(squares, [*squares[1:], None], strict=True):
            if ahead and following is not None:
                attentions[square[1]].load(square[0])
                attentions[following[1]].load(following[0])
            self._attend(*square, attentions, rows)
            attentions[square[1]].store(square[0])

    def _row(self, kind: RowKind, size: int, pieces: Pieces) -> Row:
        return Row(kind, size, [Segment((0,) * (b - a), a, self.tables[i], True) for i, a, b in pieces])

    def _attend(self, j: int, k: int, attentions: list[RowAttention], rows: list[tuple[RowKind, int, Pieces]]) -> None:
        _, size, pieces = rows[k]
        parts = [torch.cat([self.inputs[i][x][a:b] for i, a, b in pieces]) for x in range(3)]
        q, key, v = (torch.cat([part, torch.zeros(size - len(part), *part.shape[1:])]) for part in parts)
        rule, scale = RULES[self.options.rule], self.heads.dim**-0.5
        out = attentions[k].attend(CacheKey(j, 0), (q * (j + 1), key, v), rule, scale=scale, softcap=None, sinks=self.sinks)
        offset = 0
        for i, a, b in pieces:
            self.layers[j][i][a:b] = out[offset : offset + b - a]
            offset += b - a


SHARES = st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(any).map(lambda x: tuple(n / sum(x) for n in x))


@settings(derandomize=True, max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([Heads(4, 2, 16, 16), Heads(4, 4, 24, 16)]),
    st.builds(Options, st.sampled_from(sorted(RULES)), st.just(None), st.booleans()),
    st.lists(st.integers(1, 400), min_size=1, max_size=4),
    st.sampled_from([0, 40, 200]),
    st.integers(0, 9),
    SHARES,
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
)
def test_answers_do_not_depend_on_where_pages_rest(
    tmp_path: Path,
    heads: Heads,
    options: Options,
    lengths: list[int],
    prefix: int,
    seed: int,
    shares: tuple[float, float, float],
    copy_host: bool,
    ahead: bool,
    num_sweeps: int,
) -> None:
    rows = random_rows(lengths, prefix, seed)
    count = sum(num_pages(0, n) for n in lengths)
    plain = TieredMachine(heads, options, lengths, prefix, PagePool(count))
    pool = PagePool(count, host=count, disk=count, shares=shares)
    tiered = TieredMachine(heads, options, lengths, prefix, pool, copy_host=copy_host, offload_folder=tmp_path)
    cuts = [len(rows) * i // num_sweeps for i in range(num_sweeps + 1)]
    try:
        for machine in (plain, tiered):
            for begin, end in pairwise(cuts):
                if begin < end:
                    machine.sweep(rows[begin:end], ahead=ahead)
    finally:
        tiered.cache.close()
    expected = [dense(*inputs, options, plain.sinks) for inputs in plain.inputs]
    begins = [0] + [num_shared(lengths, prefix) * 32] * (len(lengths) - 1)
    for i, begin in enumerate(begins):
        assert (expected[i] - plain.layers[0][i])[begin:].abs().max() < 5e-6
        for j in range(NUM_LAYERS):
            assert torch.equal(plain.layers[j][i], tiered.layers[j][i])
