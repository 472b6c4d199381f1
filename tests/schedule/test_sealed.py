"""The scheduler of packed rows where pages are sealed: every query finds its own chunk exact, and earlier ones sealed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from flexgen_helm.attention.row_pages import sealed_now, touched_pages
from flexgen_helm.kv_cache.pages import CHUNK_TOKENS, PAGE_TOKENS, Form, PageMap, PagePool
from flexgen_helm.schedule.exact_tables import NUM_SPARE
from flexgen_helm.schedule.packed import PackedScheduler
from flexgen_helm.schedule.rows import Row, Segment, Sweep
from flexgen_helm.types import TIERS, ResolvedPolicy
from tests.schedule.symbolic import LIMITS, POLICIES, Machine, Prefix, Spec, assert_answers
from tests.schedule.test_packed import pages_alone

EXACT_BYTES, SEALED_BYTES = 7, 2
TOKENS = st.builds(
    lambda prefix, middle, rest: (7,) * prefix + (8,) * middle + rest,
    st.sampled_from([0, 31, 100, 127, 128, 250]),
    st.sampled_from([0, 0, 1, 40, 130]),
    st.lists(st.integers(0, 2), min_size=1, max_size=40).map(tuple),
)
SPECS = st.lists(
    st.builds(Spec, TOKENS, st.booleans(), LIMITS).filter(lambda spec: spec.score or spec.limits),
    min_size=1,
    max_size=8,
    unique_by=lambda spec: spec.tokens,
)


class Token(NamedTuple):
    """A token behind all before it; equal prefixes are one object."""

    before: Token | None
    token: int

    def prefix(self) -> Prefix:
        """All tokens."""
        return tuple(each.token for each in self.path())[::-1]

    def path(self) -> Iterator[Token]:
        """This token, the one before it, and so on."""
        token: Token | None = self
        while token is not None:
            yield token
            token = token.before


class SealedMachine(Machine):
    """Exact slots hold the token that was written there, sealed pages their 32 tokens."""

    def __init__(self, policy: ResolvedPolicy, specs: list[Spec], pools: dict[Form, PagePool]) -> None:
        super().__init__(policy, specs)
        self.page_maps = {form: PageMap(pool.capacities) for form, pool in pools.items()}
        self.exact: dict[tuple[int, int], Token] = {}
        self.sealed: dict[int, list[Token]] = {}
        self.known: dict[tuple[int, int], Token] = {}

    def run(self, sweep: Sweep) -> None:
        self.exact = {slot: token for slot, token in self.exact.items() if slot[0] >= 0}
        self.sealed = {page: tokens for page, tokens in self.sealed.items() if page >= 0}
        for row in sweep.rows:
            self.write(row)
        for form, page_map in self.page_maps.items():
            touched = {page for row in sweep.rows for segment in row.segments for page in touched_pages(segment, form).pages}
            for page in touched:
                kept = sweep.pages[form].kept[TIERS.index(page_map.tier_of(page))] if page >= 0 else sweep.pages[form].transient
                assert page_map.index(page) < kept
        self.computed_tokens += sweep.num_prompt_tokens

    def write(self, row: Row) -> None:
        """Write a whole row, as attention does, then read."""
        written: list[tuple[Segment, int, Token]] = []
        for segment in row.segments:
            assert segment.exact is not None
            if segment.copy is not None:
                source, target, count = segment.copy
                self.exact |= {(target, i): self.exact[source, i] for i in range(count)}
            token = self.held(segment, segment.start - 1, segment.start) if segment.start else None
            for i, number in enumerate(segment.tokens):
                position, before = segment.start + i, token
                token = self.known.setdefault((id(before), number), Token(before, number))
                self.exact[segment.exact[position // PAGE_TOKENS], position % PAGE_TOKENS] = token
                written.append((segment, i, token))
            for exact, sealed in sealed_now(segment):
                self.sealed[sealed] = [self.exact[exact, i] for i in range(PAGE_TOKENS)]
        for segment, i, token in written:
            position = segment.start + i
            for p, expected in zip(range(position, -1, -1), token.path(), strict=True):
                assert self.held(segment, p, position) is expected
            if any(request.offset == i for request in segment.logit_requests):
                self.answer(segment, i, token.prefix())

    def held(self, segment: Segment, p: int, position: int) -> Token:
        """What the query at a position reads at position p."""
        assert segment.exact is not None
        if p // CHUNK_TOKENS == position // CHUNK_TOKENS:
            return self.exact[segment.exact[p // PAGE_TOKENS], p % PAGE_TOKENS]
        return self.sealed[segment.table[p // PAGE_TOKENS]][p % PAGE_TOKENS]


def pools_of(num_bytes: int) -> dict[Form, PagePool]:
    """Pools that share bytes on two tiers."""
    sizes: dict[Form, int] = {"exact": EXACT_BYTES, "sealed": SEALED_BYTES}
    return {
        form: PagePool(num_bytes // size, host=num_bytes // size, shares=(0.5, 0.5, 0.0), page_bytes=size)
        for form, size in sizes.items()
    }


@settings(derandomize=True, max_examples=60, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(SPECS, POLICIES, st.integers(0, 300), st.booleans(), st.integers(1, 10))
def test_queries_read_their_chunk_exact_and_earlier_ones_sealed(
    specs: list[Spec], policy: ResolvedPolicy, spare: int, keep_all: bool, first: int
) -> None:
    pools = pools_of(10**6)
    probe = PackedScheduler(policy, block_tokens=1, pools=pools, keep_all=keep_all)
    most = max(probe.bytes_needed(len(spec.tokens), [limit for limit, _ in spec.limits]) for spec in specs)
    pools = pools_of(-(-most // 2) + spare)
    machine = SealedMachine(policy, specs, pools)
    scheduler = PackedScheduler(policy, block_tokens=policy.block_tokens or 1, pools=pools, keep_all=keep_all)
    assert_answers(scheduler, machine, specs, first=first)
    assert pools["sealed"].num_used == 0
    assert pools["exact"].num_used <= NUM_SPARE  # the spare ones
    assert sum(pools[form].capacity * pools[form].page_bytes for form in pools) <= scheduler.capacity_bytes + EXACT_BYTES


NEEDED = (32 + 10) * SEALED_BYTES + (4 + 4 + NUM_SPARE + 2 * 2) * EXACT_BYTES + 2 * SEALED_BYTES
"""Bytes for 1,000 tokens and 300 more: 32 and 10 sealed pages; exact ones of the chunk in which the prompt ends, of a ring and
spare ones; and what rounding costs on two tiers."""


@pytest.mark.parametrize("block_tokens", [2048, 200, 40])
def test_a_sequence_needs_at_most_eight_exact_pages_whatever_its_length(block_tokens: int) -> None:
    """Exact pages of a chunk of the prompt are free once it is computed, so that these few bytes are enough."""
    policy = ResolvedPolicy(gpu_batch_size=4, num_gpu_batches=1, gpu_batch_tokens=64, block_tokens=block_tokens)
    pools = pools_of(NEEDED // 2)
    machine = SealedMachine(policy, [Spec(tuple(range(1000)), False, ((300, 300),))], pools)
    scheduler = PackedScheduler(policy, block_tokens=block_tokens, pools=pools)
    assert scheduler.bytes_needed(1000, [300]) == NEEDED == scheduler.capacity_bytes
    scheduler.add(machine.works)
    while scheduler.has_work():
        machine.run(scheduler.next_sweep())
        assert pools["exact"].num_used <= 8 + NUM_SPARE
        assert pools["sealed"].num_used <= pages_alone(machine.works[0])
        scheduler.end_sweep()
    assert len(machine.works[0].continuations[0].tokens) == 300


@pytest.mark.parametrize("plenty", [True, False])
def test_a_prompt_shares_nothing_where_exact_pages_of_its_branches_do_not_fit(plenty: bool) -> None:
    """Others part from it in each of its chunks, and wait for it; alone it needs just what there is."""
    policy = ResolvedPolicy(gpu_batch_size=1, num_gpu_batches=1, gpu_batch_tokens=64, block_tokens=300)
    stem = tuple(range(1000))
    specs = [Spec(stem, True, ((300, 300),)), *(Spec((*stem[:cut], 2000), False, ((3, 3),)) for cut in range(100, 1000, 128))]
    pools = pools_of(100_000 if plenty else NEEDED // 2)
    machine = SealedMachine(policy, specs, pools)
    assert_answers(PackedScheduler(policy, block_tokens=300, pools=pools), machine, specs, first=len(specs))
    assert (machine.computed_tokens == len(stem) + len(specs) - 1) == plenty


@pytest.mark.parametrize("length", [20, 2000])
def test_memory_is_divided_as_the_work_needs_it(length: int) -> None:
    """Sixty-four sequences want more than there is; nearly all bytes hold pages that somebody has."""
    policy = ResolvedPolicy(gpu_batch_size=64, num_gpu_batches=1, gpu_batch_tokens=64, block_tokens=200_000)
    pools = pools_of(30 * (SEALED_BYTES * length // PAGE_TOKENS + 2 * EXACT_BYTES) // 2)
    machine = SealedMachine(policy, [Spec((i, *[1] * length), False, ((10, 10),)) for i in range(2, 66)], pools)
    scheduler = PackedScheduler(policy, block_tokens=200_000, pools=pools)
    scheduler.add(machine.works)
    scheduler.next_sweep()
    taken = sum(pool.num_used * pool.page_bytes for pool in pools.values())
    assert taken > 0.7 * scheduler.capacity_bytes
