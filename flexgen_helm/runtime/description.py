"""Description of an engine: its policy, its numerics, and its bytes on each tier."""

from __future__ import annotations

from torch import nn

from flexgen_helm.runtime.building import Parts
from flexgen_helm.types import EngineInfo


def describe(parts: Parts) -> EngineInfo:
    """Return the policy, numerics and bytes on each tier of an engine."""
    weights = parts.plan.weights
    k_bits, v_bits = parts.plan.shapes.cache_bits
    modules = nn.ModuleList([parts.loaded.model, *parts.checked.model.layers])  # stand-ins are in the layers' place
    parameters = list(modules.parameters())
    num_bytes, count = sum(p.numel() * p.element_size() for p in parameters), sum(p.numel() for p in parameters)
    fitted = parts.fitted
    if fitted is not None:
        num_bytes += fitted.num_bytes - sum(each.bound.num_bytes for each in fitted.formats.values())
    return EngineInfo(
        bits_per_compressed_weight=None if fitted is None else fitted.bits_per_weight,
        statistics="" if fitted is None else fitted.statistics,
        bits_per_weight_on_disk=weights.bits_on_disk,
        policy=parts.policy,
        numerics=parts.numerics,
        bits_per_weight=8 * num_bytes / count,
        bits_per_cache_element=8.0 * parts.kv_dtype.itemsize * parts.plan.shapes.kept_share,
        bits_per_k_element=k_bits,
        bits_per_v_element=v_bits,
        planned_bytes={str(tier): count for tier, count in weights.needed_bytes.items()},
        cache_bytes={str(tier): count for tier, count in parts.cache_bytes.items()},
        weight_bytes={str(tier): count for tier, count in weights.weight_bytes.items()},
        bit_stable=parts.checked.passed.verdict.bit_stable,
        released_dtype=parts.released_dtype,
    )
