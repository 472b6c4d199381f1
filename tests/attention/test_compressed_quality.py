"""On real weights and text the engine loses what the plain rule loses, within the interval of its mean divergence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_helm.assets.sotu import recent_addresses
from flexgen_helm.errors import CorruptFile, FlexGenError
from tests.attention.compressed_quality import EngineSide, Judge, sides

pytestmark = pytest.mark.slow
TOKENS = 512


@pytest.fixture(scope="module")
def both(real_model: Path) -> Iterator[tuple[Judge, EngineSide]]:
    try:
        recent_addresses()
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))
    with sides(real_model, TOKENS) as loaded:
        yield loaded


@pytest.mark.parametrize("variant", ["kv4", "kv2", "s10", "kv4s10", "kv4-flexgen", "s10-flexgen"])
def test_the_mean_divergence_lies_in_the_references_interval(both: tuple[Judge, EngineSide], variant: str) -> None:
    judge, engine = both
    wanted, found = judge.loss(variant), engine.loss(variant)
    assert wanted.kl_interval is not None
    low, high = wanted.kl_interval
    assert 0 < low <= found.kl <= high
