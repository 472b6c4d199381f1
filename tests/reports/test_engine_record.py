"""Bits per weight that a plot shows."""

from __future__ import annotations

import pytest

from flexgen_helm.reports.engine_record import engine_record
from tests.reports.synthetic import record_of


@pytest.mark.parametrize(
    ("variant", "compressed", "released", "bits"),
    [
        (None, None, "float16", 16.0),
        ("kv4", None, "float16", 16.0),  # weights are as they were released, though computed in float32
        ("w4kv4", 4.5, "float16", 4.5),
        ("kv4", None, "float32", 32.0),
    ],
)
def test_bits_are_those_of_the_release_or_of_compressed_matrices(
    variant: str | None, compressed: float | None, released: str, bits: float
) -> None:
    made = record_of(
        f"flexgen/a/model@{variant or ''}", bits_per_weight=32.0, bits_per_compressed_weight=compressed, released_dtype=released
    )
    assert engine_record(made).bits == bits
