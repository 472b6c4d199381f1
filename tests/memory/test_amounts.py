"""Amounts of memory as users write them."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen_helm.errors import PolicyError
from flexgen_helm.memory.amounts import parse_max_memory, parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [("15GiB", 15 * 2**30), ("1.5 GB", 1_500_000_000), ("300mib", 300 * 2**20), ("7KB", 7000), (12, 12), ("12", 12)],
)
def test_sizes(text: str | int, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("given", [{"gpu": "1GiB"}, {"device": "much"}, {"host": -1}, {"disk": "1XB"}, "15GiB"])
def test_limits_that_make_no_sense_are_refused(given: Any) -> None:
    with pytest.raises(PolicyError, match="Give"):
        parse_max_memory(given)
