"""Decode rows that read sealed chunks, all of them or sparsely."""

from tests.mutants.mutant import Mutant

TESTS = "tests/attention/test_decode_sealed.py"
CODES = f"{TESTS}::test_codes_are_read_with_the_two_roundings_of_fp32"
FORMS = f"{TESTS}::test_one_chunk_is_exact_for_its_own_query_and_sealed_for_a_later_one"
DENSE = f"{TESTS}::test_earlier_chunks_are_sealed_and_the_own_is_exact"
SPARSE = "tests/attention/test_sparse_decode.py::test_queries_read_what_the_rule_says_alone_together_and_in_threads"
PLACES = "tests/attention/test_sparse_decode.py::test_pages_at_other_places_of_which_only_the_chosen_rows_are_there"

MUTANTS = (
    Mutant(
        name="sealed-decode-own-chunk",
        file="flexgen_helm/attention/decode.py",
        old='chunk[0].form == "sealed" for chunk',
        new='chunk[0].form != "" for chunk',
        tests=(FORMS,),
        why="a query reads its own chunk from codes that do not exist yet",
    ),
    Mutant(
        name="sealed-decode-forms-mixed",
        file="flexgen_helm/attention/decode.py",
        old="found[visit.chunk, visit.form, visit.pages]",
        new='found[visit.chunk, "exact", visit.pages]',
        tests=(FORMS,),
        why="what a query reads depends on who shares its chunk",
    ),
    Mutant(
        name="sealed-decode-head-bytes",
        file="flexgen_helm/attention/decode.py",
        old="form.num_bytes // form.num_heads",
        new="form.num_bytes",
        tests=(DENSE,),
        why="the second head is read from another page",
    ),
    Mutant(
        name="sealed-decode-kinds-swapped",
        file="flexgen_helm/attention/decode_kernel.py",
        old="head_bytes[c, 1], kinds[c, 1]",
        new="head_bytes[c, 1], kinds[c, 0]",
        tests=(DENSE,),
        why="values are read with the bits of keys",
    ),
    Mutant(
        name="sealed-decode-code-order",
        file="flexgen_helm/attention/decode_codes.py",
        old="zip(parts[:half], parts[half:], strict=True)",
        new="zip(parts[::2], parts[1::2], strict=True)",
        tests=(CODES,),
        why="tokens of 2 bits change places",
    ),
    Mutant(
        name="sealed-decode-odd-row",
        file="flexgen_helm/attention/decode_codes.py",
        old="+ (dim * bits + 7) // 8 + 1) // 2 * 2",
        new="+ (dim * bits + 7) // 8)",
        tests=(CODES,),
        why="values of heads of an odd number of bytes are read a byte too early",
    ),
    Mutant(
        name="sparse-decode-one-key-short",
        file="flexgen_helm/attention/sparse_decode.py",
        old="-(-seen * percent // 100)",
        new="np.maximum(1, seen * percent // 100)",
        tests=(SPARSE,),
        why="a query reads fewer values than its share, rounded up",
    ),
    Mutant(
        name="sparse-decode-means-of-all",
        file="flexgen_helm/attention/sparse_decode_kernel.py",
        old="weights[count], scores[at] = scores[at], 0",
        new="weights[count] = scores[at]",
        tests=(SPARSE,),
        why="keys that are read count twice",
    ),
    Mutant(
        name="sparse-decode-place-among-chunks",
        file="flexgen_helm/attention/sparse_decode.py",
        old="np.arange(len(by_query)) - np.repeat(begins, counts)",
        new="np.arange(len(by_query)) % counts.max()",
        tests=(SPARSE,),
        why="scores of a query's chunks change places with those of a neighbour",
    ),
    Mutant(
        name="sparse-decode-rows-of-one-head",
        file="flexgen_helm/attention/sparse_decode_kernel.py",
        old="union[numbers[c, p], j * num_kv // heads] |= found",
        new="union[numbers[c, p], j * num_kv // heads] = found",
        tests=(PLACES,),
        why="rows of V that only some heads read are not brought",
    ),
    Mutant(
        name="sparse-decode-last-of-equals",
        file="flexgen_helm/attention/selection.py",
        old="u32(0x80000000) >> num_above_last(bits)",
        new="bits & (~bits + u32(1))",
        tests=("tests/attention/test_selection.py",),
        why="of equal scores the last keys are read",
    ),
)
