"""Whether slabs are worth coding, by hand: the seconds of a sweep with plain and with coded slabs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_helm.policy.slab_coding import LEAST_GAIN, SlabCosts, is_worth_coding

GPU = SlabCosts(
    plain_bytes=60 * 10**9,
    coded_bytes=40e9,
    disk_rate=2e9,
    num_weights=30e9,
    decoding_rate=2e9,
    computing_seconds=0,
)
"""30 G weights from a disk of 2 GB/s: 30 s as they are, 20 s coded, of which decoding takes 15 s."""


@pytest.mark.parametrize(
    ("changes", "plain", "coded", "worth"),
    [
        ({}, 30, 20, True),
        ({"decoding_rate": 1e9}, 30, 30, False),  # decoding takes as long as reading
        ({"decoding_rate": 30e9 / 26}, 30, 26, True),
        ({"decoding_rate": 30e9 / 28}, 30, 28, False),  # less than a tenth is saved
        ({"disk_rate": 6e9}, 10, 15, False),  # the disk is fast
        ({"computing_seconds": 5.0}, 30, 20, True),  # the cores wait for the disk, with time to decode
        ({"computing_seconds": 10.0}, 30, 25, True),
        ({"computing_seconds": 20.0}, 30, 35, False),  # they would keep the disk waiting
        ({"computing_seconds": 100.0}, 100, 115, False),  # they do already
    ],
)
def test_a_sweep_takes_as_long_as_its_slowest_part(changes: dict[str, float], plain: float, coded: float, worth: bool) -> None:
    costs = replace(GPU, **changes)  # type: ignore[arg-type]
    assert (costs.plain_seconds, costs.coded_seconds) == pytest.approx((plain, coded))
    assert is_worth_coding(costs) == worth


@given(
    disk_rate=st.floats(1e8, 2e10), decoding_rate=st.floats(1e8, 2e10), computing=st.floats(0, 100), on_gpu=st.floats(0, 100)
)
def test_coding_that_is_chosen_makes_no_sweep_longer(
    disk_rate: float, decoding_rate: float, computing: float, on_gpu: float
) -> None:
    """Beside a GPU however long that computes, since it does so beside disk and cores."""
    costs = replace(GPU, disk_rate=disk_rate, decoding_rate=decoding_rate, computing_seconds=computing)
    if is_worth_coding(costs):
        assert max(costs.coded_seconds, on_gpu) <= max(costs.plain_seconds, on_gpu)
        assert costs.coded_seconds <= (1 - LEAST_GAIN) * costs.plain_seconds
