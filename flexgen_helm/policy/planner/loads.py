"""Loads: what the rows of a sweep ask of the machine, counted from their segments and pages. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS, Form, PageMap, Residency
from flexgen_helm.machine.profile import RowKind
from flexgen_helm.policy.planner.order import Resumed, performed
from flexgen_helm.schedule.operations import sweep_operations
from flexgen_helm.schedule.rows import Row, Sweep
from flexgen_helm.types import Tier

Pages = tuple[tuple[Tier, Form, int], ...]
"""Tier, form and number of pages."""


@dataclass(frozen=True)
class RowLoad:
    """One row in one layer.

    Attributes:
        kind: Kind of row.
        size: Its tokens, padding included.
        own_keys: Keys of queries' own chunks, a whole chunk for each query.
        earlier_keys: Keys of earlier chunks. Prefill: summed over queries; decode: those that several queries read count once.
        brought: Pages that are brought before it attends.
        taken: Pages that are written back behind it.
        stages: Whether it has pages that attention cannot read where they are stored.
        on_host: Whether the CPU attends for it beside the device.
    """

    kind: RowKind
    size: int
    own_keys: int
    earlier_keys: int
    brought: Pages = ()
    taken: Pages = ()
    stages: bool = False
    on_host: bool = False


@dataclass(frozen=True)
class SweepLoad:
    """A sweep, or several that are alike.

    Attributes:
        rows: Its rows.
        logits: Positions whose logits are needed.
        prompt_tokens: Tokens in prefill rows, without padding.
        generated_tokens: Tokens that are chosen at its end.
        count: Sweeps that it stands for.
        answers: Whether a job is answered at its end.
        cache_bytes: Bytes of K and V that are held on each tier.
    """

    rows: tuple[RowLoad, ...]
    logits: int
    prompt_tokens: int
    generated_tokens: int
    count: int = 1
    answers: bool = False
    cache_bytes: Mapping[Tier, int] = field(default_factory=dict)


def row_loads(sweep: Sweep, maps: Mapping[Form, PageMap], on_host: Collection[int], *, staged: bool) -> tuple[RowLoad, ...]:
    """Count what the rows of a sweep do in a layer.

    Args:
        sweep: The sweep.
        maps: Tiers of pages.
        on_host: Rows for which the CPU attends beside the device.
        staged: Whether there are pages that attention cannot read where they are stored.
    """
    if not staged:
        return tuple(_load(row, on_host=k in on_host) for k, row in enumerate(sweep.rows))
    pages = [RowPages(row, maps, host_attends=k in on_host) for k, row in enumerate(sweep.rows)]
    brought, taken = _moved(pages, maps, frozenset(on_host))
    return tuple(
        _load(row, on_host=k in on_host, moved=(brought[k], taken[k]), stages=any(x.pages for x in pages[k].staged.values()))
        for k, row in enumerate(sweep.rows)
    )


def _load(row: Row, *, on_host: bool, moved: tuple[Pages, Pages] = ((), ()), stages: bool = False) -> RowLoad:
    own = row.num_tokens * CHUNK_TOKENS
    if row.kind == "prefill":
        earlier = sum(earlier_keys(segment.end) - earlier_keys(segment.start) for segment in row.segments)
        return RowLoad("prefill", row.size, own, earlier, *moved, stages)
    # A chunk's last page tells the chunk: sequences that share it share all before it.
    chunks: set[int] = set()
    for segment in row.segments:
        chunks.update(segment.table[CHUNK_PAGES - 1 : segment.start // CHUNK_TOKENS * CHUNK_PAGES : CHUNK_PAGES])
    return RowLoad("decode", row.size, own, len(chunks) * CHUNK_TOKENS, *moved, stages, on_host)


def earlier_keys(end: int) -> int:
    """Return the number of pairs of a position below ``end`` and a key in an earlier chunk than its own."""
    whole, rest = divmod(end, CHUNK_TOKENS)
    return CHUNK_TOKENS * (CHUNK_TOKENS * whole * (whole - 1) // 2 + whole * rest)


def _moved(
    pages: Sequence[RowPages], maps: Mapping[Form, PageMap], suspending: frozenset[int]
) -> tuple[list[Pages], list[Pages]]:
    """Return the pages that each row brings and takes away in a layer: a page that a loaded row has is not brought again."""
    brought: list[dict[tuple[Tier, Form], int]] = [{} for _ in pages]
    taken: list[dict[tuple[Tier, Form], int]] = [{} for _ in pages]
    for form, page_map in maps.items():
        residency = Residency()
        residency.reset(sum(len(each.staged[form].pages) for each in pages))
        for step in performed(sweep_operations("zigzag", 1, len(pages)), suspending):
            if isinstance(step, Resumed):
                continue
            staged = pages[step.k].staged[form] if step.k >= 0 else None
            if step.kind == "load_cache" and staged is not None:
                _count(brought[step.k], page_map, form, residency.load(0, staged).missing)
            elif step.kind == "store_cache" and staged is not None:
                _count(taken[step.k], page_map, form, residency.release(0, staged))
    return [_listed(found) for found in brought], [_listed(found) for found in taken]


def _listed(found: Mapping[tuple[Tier, Form], int]) -> Pages:
    return tuple((tier, form, count) for (tier, form), count in found.items())


def _count(found: dict[tuple[Tier, Form], int], page_map: PageMap, form: Form, pages: Collection[int]) -> None:
    for tier, each in groupby(sorted(pages), key=page_map.tier_of):
        found[tier, form] = found.get((tier, form), 0) + sum(1 for _ in each)
