"""What this package recorded of the engine that served a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HALF = ("float16", "bfloat16")
CACHE_BITS = ("bits_per_cache_element", "bits_per_k_element", "bits_per_v_element")
"""Bits of an element of both together, of K, and of V; scales included."""
NO_RECORD = "no record of the engine: the run was served without this package's runner"
NOTHING_COMPUTED = "every answer was known before, so no speed was measured"


@dataclass(frozen=True)
class Throughput:
    """Speed of the requests that were computed. Cached and resumed answers are no part of it."""

    date: str
    """When serving ended; runs that were served together share the measurement and its date."""
    tokens: int
    """Prompt tokens computed and tokens generated."""
    seconds: float
    limit_share: float | None
    """The least time that the machine would need over the time taken; None: not known."""


@dataclass(frozen=True)
class EngineRecord:
    """An engine. A field is None where an older version of this package did not record it."""

    model: str
    """Name or folder, without the variant."""
    variant: str | None
    """Canonical name of the compressed variant; None: the model as it is."""
    released_dtype: str
    """Empty: not known."""
    numerics: Mapping[str, Any]
    """As `flexgen_helm.types.Numerics` in plain types."""
    bits_per_weight: float | None
    """Average over all weights as they are stored."""
    bits_per_compressed_weight: float | None
    """Average over compressed matrices, scales included; None: none is compressed."""
    bits_per_cache_element: float | None
    bits_per_k_element: float | None
    bits_per_v_element: float | None
    """Means of V included."""
    weight_bytes: Mapping[str, int]
    """On each tier."""
    cache_bytes: Mapping[str, int]
    """Room for K and V on each tier."""
    bit_stable: bool | None
    throughput: Throughput | None
    """None: nothing was computed."""
    environment: Mapping[str, Any]
    """Machine and libraries of the command that wrote the run, as `flexgen_helm.machine.identity.environment` has them."""
    sources: Mapping[str, int]
    """Answers of the run: ``total``, and how many were ``computed``, ``cached``, ``resumed``."""

    @property
    def dtype(self) -> str:
        """The dtype in which weights are computed; empty if it was not recorded."""
        return str(self._weights.get("dtype", ""))

    @property
    def digest(self) -> str:
        """Digest of the checkpoint; empty if it was not recorded."""
        return str(self._weights.get("digest", ""))

    @property
    def _weights(self) -> Mapping[str, Any]:
        return _mapping(self.numerics.get("weights"))

    @property
    def is_half(self) -> bool:
        """Whether the weights as released have 16 bits and none is compressed, whatever the dtype that computes."""
        return self.variant is None and self._released_half

    @property
    def bits(self) -> float | None:
        """Bits per weight that a plot shows: of compressed matrices, or of the weights as they were released."""
        if self.bits_per_compressed_weight is not None:
            return self.bits_per_compressed_weight
        return 16.0 if self._released_half else self.bits_per_weight

    @property
    def _released_half(self) -> bool:
        return (self.released_dtype or self.dtype) in HALF


def engine_record(content: Mapping[str, Any]) -> EngineRecord:
    """Make a record of the record of a run, as `Run.record` returned it."""
    variant, stable = content.get("variant"), content.get("bit_stable")
    return EngineRecord(
        model=str(content.get("model", "")),
        variant=str(variant) if variant else None,
        released_dtype=str(content.get("released_dtype", "")),
        numerics=_mapping(content.get("numerics")),
        **{name: _number(content.get(name)) for name in ("bits_per_weight", "bits_per_compressed_weight", *CACHE_BITS)},
        weight_bytes=_counts(content.get("weight_bytes")),
        cache_bytes=_counts(content.get("cache_bytes")),
        bit_stable=stable if isinstance(stable, bool) else None,
        throughput=_throughput(_mapping(content.get("measured"))),
        environment=_mapping(content.get("environment")),
        sources=_counts(content.get("requests")),
    )


def _throughput(measured: Mapping[str, Any]) -> Throughput | None:
    stats = _mapping(measured.get("stats"))
    seconds = _number(stats.get("seconds"))
    tokens = sum(_number(stats.get(name)) or 0 for name in ("prompt_tokens_computed", "generated_tokens"))
    if not seconds or not tokens:
        return None
    return Throughput(str(measured.get("date", "")), int(tokens), seconds, _number(measured.get("roofline_efficiency")))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _counts(value: Any) -> dict[str, int]:
    numbers = {tier: _number(count) for tier, count in _mapping(value).items()}
    return {tier: int(count) for tier, count in numbers.items() if count is not None}
