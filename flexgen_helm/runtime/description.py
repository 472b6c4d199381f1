"""Description of an engine: its policy, its numerics, its bytes on each tier, and the least time that a run needs."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from flexgen_helm.machine.rates import measure_rates
from flexgen_helm.policy.roofline import layer_sizes, with_limit
from flexgen_helm.policy.shapes_of_model import setting
from flexgen_helm.run_stats import RunStats
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
        stages=parts.stages,
    )


def limited(parts: Parts, stats: RunStats) -> RunStats:
    """Return a run's stats with the least time that this machine needs for them; see `Engine.with_limit`."""
    model = parts.loaded.model
    sizes = layer_sizes(
        parts.checked.model.layers,
        setting(model, "num_experts_per_tok"),
        model.get_output_embeddings(),
        **parts.plan.weights.bytes_per_sweep,
    )
    if not stats.per_sweep:
        return stats
    if parts.neighbours is not None:
        return replace(stats, limit_unknown="layers are divided into stages")
    if sizes is None:
        return replace(stats, limit_unknown="the config does not say how many experts a token uses")
    rates = measure_rates(
        parts.device.torch_device,
        model.dtype,
        matrix=sizes.widest,
        row_tokens=(parts.policy.gpu_batch_tokens, parts.policy.gpu_batch_size),
        used=[name for name, count in stats.bytes_moved.items() if count],
        folder=parts.folder if parts.folder.exists() else None,
    )
    return with_limit(stats, sizes, rates)
