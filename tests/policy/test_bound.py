"""What a run waited for, from made-up sweeps whose answer is plain."""

from __future__ import annotations

import pytest

from flexgen_helm.policy.bound import BOUNDS, bound_of
from flexgen_helm.run_stats import RunStats, SweepStats
from flexgen_helm.types import RESOURCES


def sweep(seconds: float, moved: dict[str, int], weights: dict[str, int], busy: dict[str, float]) -> SweepStats:
    return SweepStats(0.0, seconds, 1, 1, 1, moved, weights, busy)


def test_nothing_is_said_of_nothing() -> None:
    assert bound_of(RunStats()) is None
    assert bound_of(RunStats(per_sweep=[sweep(1, {}, {}, {})])) is None


def test_the_longest_time_counts_not_the_number_of_sweeps() -> None:
    computing = [sweep(1, {}, {}, {"device": 1, "disk_read": 0.5})] * 3
    reading = [sweep(10, {"disk_read": 9}, {"disk_read": 9}, {"device": 1, "disk_read": 8})]
    bound = bound_of(RunStats(per_sweep=[*computing, *reading]))
    assert bound is not None
    assert bound.what == "reading weights from the disk"
    for help_ in ("more host memory", "bfloat16", "more prompts at a time"):
        assert help_ in bound.advice


@pytest.mark.parametrize("link", ["disk_read", "host_to_device"])
def test_weights_are_told_from_the_cache(link: str) -> None:
    for weights, expected in ((9, "weights"), (1, "K, V or hidden states")):
        bound = bound_of(RunStats(per_sweep=[sweep(1, {link: 10}, {link: weights}, {link: 1})]))
        assert bound is not None
        assert expected in bound.what


@pytest.mark.parametrize(
    ("read", "products", "expected"), [(2.0, 1.0, "memory"), (1.0, 2.0, "matrices"), (0.0, 0.0, "matrices")]
)
def test_memory_is_told_from_products(read: float, products: float, expected: str) -> None:
    least = {"read": read, "products": products} if read else {}
    bound = bound_of(RunStats(per_sweep=[sweep(1, {}, {}, {"device": 1})], least_seconds=least))
    assert bound is not None
    assert expected in bound.what


def test_every_resource_has_words() -> None:
    assert set(RESOURCES) <= set(BOUNDS)
