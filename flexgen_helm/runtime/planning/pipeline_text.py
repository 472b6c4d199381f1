"""A plan of a pipeline in words and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from flexgen_helm.memory.amounts import gib
from flexgen_helm.policy.planner.pipeline.network import NO_NETWORK, Network
from flexgen_helm.policy.planner.pipeline.predict import PipelinePrediction
from flexgen_helm.policy.planner.pipeline.scaling import PAYS, Scaling
from flexgen_helm.policy.planner.search.choose import Problem
from flexgen_helm.runtime.planning.text import policy_text


class PlannedPipeline(NamedTuple):
    """What was planned.

    Attributes:
        model: Name of the model.
        problem: What is asked, and the machine of each stage.
        network: What lies between the stages.
        scaling: What numbers of stages are predicted to bring.
    """

    model: str
    problem: Problem
    network: Network
    scaling: Scaling


def pipeline_json(planned: PlannedPipeline) -> dict[str, Any]:
    """Return a plan in plain types."""
    network, scaling = planned.network, planned.scaling
    return {
        "model": planned.model,
        "machine": planned.problem.profile.name,
        "network": None if network == NO_NETWORK else {"bytes_per_second": network.rate, "latency_seconds": network.latency},
        "pays": scaling.pays,
        "stages": {str(count): _as_json(each) for count, each in scaling.predictions.items()},
        "refused": {str(count): reason for count, reason in scaling.refused.items()},
    }


def _as_json(made: PipelinePrediction) -> dict[str, Any]:
    return {
        "policy": dataclasses.asdict(made.policy),
        "lanes": made.lanes,
        "tokens_per_second": made.tokens_per_second,
        "seconds": made.seconds,
        "latency_seconds": made.latency_seconds,
        "sweeps": made.sweeps,
        "prompt_tokens": made.prompt_tokens,
        "generated_tokens": made.generated_tokens,
        "binding": made.binding,
        "seconds_without_latency": made.without_latency,
        "seconds_without_rate": made.without_rate,
        "seconds_without_network": made.without_network,
        "stages": [
            {
                "layers": [stage.layers.start, stage.layers.stop],
                "busy_seconds": dict(stage.busy_seconds),
                "bytes_moved": dict(stage.bytes_moved),
                "bytes_sent": stage.bytes_sent,
                "peak_bytes": dict(stage.peak_bytes),
            }
            for stage in made.stages
        ],
    }


def pipeline_lines(planned: PlannedPipeline) -> Iterator[str]:
    """Yield a plan as lines for a reader."""
    profile, scaling, network = planned.problem.profile, planned.scaling, planned.network
    shown = "not counted; --network RATE,LATENCY names it" if network == NO_NETWORK else str(network)
    yield f"{planned.model} on stages of {profile.name} each ({profile.device}, profile of {profile.date})"
    yield f"network: {shown}"
    unit = "new tokens" if any(each.generated_tokens for each in scaling.predictions.values()) else "prompt tokens"
    for count, each in scaling.predictions.items():
        line = f"{_count(count)}: {each.tokens_per_second:.3g} {unit}/s"
        if scaling.speedup(count) != 1:
            fewest = next(iter(scaling.predictions))
            line += f", {scaling.speedup(count):.2f} times {_count(fewest)}, {scaling.efficiency(count):.0%} of each"
        yield f"{line}; {each.binding} binds"
    for count, reason in scaling.refused.items():
        yield f"{_count(count)}: {reason}"
    if len(scaling.predictions) > 1:
        more = [count for count in scaling.predictions if count > scaling.pays]
        yield f"up to {_count(scaling.pays)} pay" + (f"; more add less than {PAYS:.0%}" if more else "")
    yield from _details(scaling.predictions[scaling.pays], unit)


def _details(made: PipelinePrediction, unit: str) -> Iterator[str]:
    tokens = made.tokens_per_second * made.seconds
    yield f"with {_count(len(made.stages))} and {made.lanes} sweeps in flight:"
    yield f"  policy: {policy_text(made.policy)}"
    yield f"  prediction: {made.seconds:.4g} s, {made.latency_seconds:.3g} s until the first answer, {made.sweeps:,} sweeps"
    for name, seconds in (("latency", made.without_latency), ("limit of its rate", made.without_rate)):
        if seconds < made.seconds:
            yield f"  without the network's {name}: {tokens / seconds:.3g} {unit}/s"
    for s, (stage, share) in enumerate(zip(made.stages, made.utilisation, strict=True)):
        peaks = ", ".join(f"{gib(count)} on the {tier}" for tier, count in stage.peak_bytes.items() if count)
        layers = f"layers {stage.layers.start} to {stage.layers.stop - 1}"
        sent = f", sends {gib(stage.bytes_sent)}" if stage.bytes_sent else ""
        yield f"  stage {s}: {layers}, {stage.binding} busy {share:.0%}{sent}; peaks: {peaks}"


def _count(count: int) -> str:
    return f"{count} stage" if count == 1 else f"{count} stages"
