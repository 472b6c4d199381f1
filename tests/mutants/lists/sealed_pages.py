"""Mutants of who has which page of a cache that seals pages, and of sparse attention."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TABLES = "tests/schedule/test_sealed.py::test_queries_read_their_chunk_exact_and_earlier_ones_sealed"
APART = "tests/schedule/test_sealed.py::test_a_prompt_shares_nothing_where_exact_pages_of_its_branches_do_not_fit"
LEAST = "tests/schedule/test_sealed.py::test_a_sequence_needs_at_most_eight_exact_pages_whatever_its_length"
ROWS = "tests/kv_cache/test_chosen_rows.py"
CHOSEN = "tests/runtime/test_chosen_values.py::test_answers_in_kernel_calls"
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
        name="admitted-work-never-fits",
        file="flexgen_helm/schedule/packed.py",
        old="or (work.node.parent is not None and self._reserve_apart(work))",
        new="",
        tests=(APART,),
        why="a job that was let in waits for ever, because others part from it in many chunks",
    ),
    Mutant(
        name="job-that-fits-is-refused",
        file="flexgen_helm/schedule/exact_tables.py",
        old="return self._num_own(0, length) + sum(",
        new="return num_pages(0, length) + sum(",
        tests=(LEAST,),
        why="a job that fits only because its cache is compressed is refused",
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
    Mutant(
        name="values-of-the-page-before",
        file="flexgen_helm/kv_cache/working_set.py",
        old="self._held.set(list(missing.values()), whole=False)",
        new="self._held.set(list(missing.values()), whole=True)",
        tests=(ROWS,),
        why="values that a query chose never come, and those of another page are read",
    ),
    Mutant(
        name="values-brought-again",
        file="flexgen_helm/kv_cache/cargo.py",
        old="held[slots] = here | missing",
        new="held[slots] = here",
        tests=(ROWS,),
        why="rows of one layer that choose the same values bring them twice",
    ),
    Mutant(
        name="values-beside-a-row-of-prompts",
        file="flexgen_helm/kv_cache/pages.py",
        old="is_partial |= not resident.whole",
        new="is_partial = False",
        tests=(ROWS,),
        why="a prompt that shares a page with a decode row reads values that did not come",
    ),
    Mutant(
        name="values-of-one-head-of-a-group",
        file="flexgen_helm/attention/sparse.py",
        old="read = by_group.any(3).float()",
        new="read = by_group[:, :, :, 0].float()",
        tests=(CHOSEN,),
        why="what the other query heads of a K/V head chose never comes",
    ),
)
