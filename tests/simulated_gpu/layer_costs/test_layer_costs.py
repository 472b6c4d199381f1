"""What rows of large models ask of the device does not grow unseen; and counts and times against numbers by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulated_gpu.gpu import Event, Size
from tests.simulated_gpu.layer_costs.counting import Counts, operations
from tests.simulated_gpu.layer_costs.rows import FIRST, STEADY, Case, Cost, cases, counts_of
from tests.simulated_gpu.layer_costs.times import LAUNCH_SECONDS, kernel_seconds, times_of

BUDGETS: dict[tuple[str, str, str], tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    ("OPT-30B", "decode, 40 x 544, the CPU attends", "CPU"): ((25, 78, 1), (25, 78, 1)),
    ("OPT-30B", "decode, 40 x 544, K/V brought", "by hand"): ((792, 245, 0), (774, 237, 0)),
    ("OPT-30B", "prompt, 4,096 of 512", "by hand"): ((766, 133, 0), (752, 105, 0)),
    ("OPT-30B", "scoring, 100 each behind 600", "by hand"): ((1362, 134, 0), (1334, 74, 0)),
    ("Llama-3-8B", "decode, 64 x 544, resident", "by hand"): ((236, 8, 0), (218, 0, 0)),
    ("Llama-3-8B", "prompt, 2,048 of 512", "by hand"): ((387, 16, 0), (373, 0, 0)),
    ("Mixtral-8x7B", "decode, 40 x 544, K/V on the device", "by hand"): ((263, 183, 1), (245, 175, 1)),
    ("Mixtral-8x7B", "prompt, 2,048 of 512", "by hand"): ((439, 191, 1), (425, 175, 1)),
    ("OPT-30B", "decode, 40 x 544, K/V brought", "kernel"): ((203, 240, 0), (202, 237, 0)),
    ("OPT-30B", "prompt, 4,096 of 512", "kernel"): ((91, 108, 0), (90, 105, 0)),
    ("OPT-30B", "scoring, 100 each behind 600", "kernel"): ((34, 77, 0), (33, 74, 0)),
    ("Llama-3-8B", "decode, 64 x 544, resident", "kernel"): ((55, 3, 0), (54, 0, 0)),
    ("Llama-3-8B", "prompt, 2,048 of 512", "kernel"): ((55, 3, 0), (54, 0, 0)),
    ("Mixtral-8x7B", "decode, 40 x 544, K/V on the device", "kernel"): ((107, 178, 1), (106, 175, 1)),
    ("Mixtral-8x7B", "prompt, 2,048 of 512", "kernel"): ((107, 178, 1), (106, 175, 1)),
}
"""Launches, copies and waits in the first and in the steady layer, the copy of its weights included."""


@pytest.mark.slow
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case.model}, {case.rows}, {case.attention}")
def test_rows_of_large_models_stay_within_their_budgets(case: Case, tmp_path: Path) -> None:
    costs = counts_of(case, tmp_path)
    for j, most in zip((FIRST, STEADY), BUDGETS[case.model, case.rows, case.attention], strict=True):
        both = costs[j].row + costs[j].weights
        found = both.launches, both.copies, both.waits
        assert all(count <= budget for count, budget in zip(found, most, strict=True)), f"{found} exceeds {most}"


def test_work_of_all_threads_counts_and_waits_of_the_one_that_computes() -> None:
    product = Size(100, ((2, 3), (3, 5)), 2)
    events = [
        Event("launch", "mm", "main", "", product),
        Event("launch", "index_copy_", "link", "", Size(7)),
        Event("copy", "h2d pinned", "link", "", Size(40)),
        Event("copy", "d2h pageable", "main", "", Size(8)),
        Event("wait", "d2h pageable", "main", ""),
        Event("wait", "Event.synchronize", "link", ""),
    ]
    counts = Counts.of(events, "main")
    assert counts == Counts(2, 2, 1, (product, Size(7)), 40, 8)
    assert counts.num_bytes == 107
    assert counts + counts == Counts(4, 4, 2, (product, Size(7)) * 2, 80, 16)


def test_products_have_two_operations_for_each_element_of_their_inner_dimension() -> None:
    """A bias in front of the operands changes nothing; attention in one kernel has scores and weighted values."""
    assert operations(Size(0, ((2, 3), (3, 5)))) == operations(Size(0, ((5,), (2, 3), (3, 5)))) == 2 * 2 * 3 * 5
    assert operations(Size(0, ((4, 2, 3), (4, 3, 5)))) == 4 * 2 * 2 * 3 * 5
    assert operations(Size(0, ((1, 8, 16, 64), (1, 8, 128, 64), (1, 8, 128, 64)))) == 4 * 8 * 16 * 128 * 64
    assert operations(Size(50)) == 0


def test_the_slower_of_bytes_and_products_is_the_time_of_a_kernel() -> None:
    assert kernel_seconds(Size(2_980_000_000)) == pytest.approx(1e-3 + LAUNCH_SECONDS)
    half, single = (Size(10, ((1000, 1000), (1000, 300_000)), itemsize) for itemsize in (2, 4))
    assert kernel_seconds(half) == pytest.approx(1e-3 + LAUNCH_SECONDS)
    assert kernel_seconds(single) == pytest.approx(600 / 45 * 1e-3 + LAUNCH_SECONDS)
    kernel = Size(2_980_000)  # 1 us, and 2 us for its launch
    times = times_of(Cost(Counts(10, 2, 1, (kernel,) * 10, 549_000, 5_490_000), Counts(0, 1, 0, (), 54_900)))
    assert times == pytest.approx((156e-6, 30e-6, 100e-6))
    assert (times.layer(0), times.layer(1)) == pytest.approx((156e-6, 186e-6))
