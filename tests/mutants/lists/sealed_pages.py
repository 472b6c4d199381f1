"""Mutants of who has which page of a cache that seals pages, and of sparse attention."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TABLES = "tests/schedule/test_sealed.py::test_queries_read_their_chunk_exact_and_earlier_ones_sealed"
RULE = "tests/attention/test_row_sealed.py::test_rows_equal_the_rule"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="exact-pages-end-of-a-prefix",
        file="flexgen_helm/schedule/exact_tables.py",
        old="if not pages.kept or (last <= end and not self._keep_all):",
        new="if not pages.kept or (last <= end + 32 and not self._keep_all):",
        tests=(TABLES,),
        why="who branches from a prefix inside a chunk later finds nothing there",
    ),
    Mutant(
        name="exact-pages-ring-of-one",
        file="flexgen_helm/schedule/exact_tables.py",
        old="own[i % len(own)]",
        new="own[0]",
        tests=(TABLES,),
        why="a completion overwrites the page before",
    ),
    Mutant(
        name="sealed-before-it-is-full",
        file="flexgen_helm/attention/row_pages.py",
        old="full = slice(segment.start // PAGE_TOKENS, segment.end // PAGE_TOKENS)",
        new="full = slice(-(-segment.start // PAGE_TOKENS), segment.end // PAGE_TOKENS)",
        tests=(RULE,),
        why="a page that two rows fill is never sealed",
    ),
    Mutant(
        name="sparse-one-key-short",
        file="flexgen_helm/attention/sparse_kernel.py",
        old="(count * percent + 99) // 100",
        new="max(1, count * percent // 100)",
        tests=(RULE,),
        why="a query reads fewer values than its share, rounded up",
    ),
    Mutant(
        name="sparse-means-of-all",
        file="flexgen_helm/attention/sparse.py",
        old="others = (weights * (1 - read))",
        new="others = weights",
        tests=(RULE,),
        why="keys that are read count twice",
    ),
)
