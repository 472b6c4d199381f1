"""The figures of a comparison as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flexgen_helm.fidelity.layers import costliest

Row = tuple[str, str, str]
NAMES = {
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity, candidate over reference",
    "bits_per_byte": "bits per byte",
    "kl": "KL divergence (nats)",
    "top1_agreement": "most likely token equal",
    "delta_p": "change of the correct token's probability",
}
PARTS = {"p99": "99 %", "p999": "99.9 %", "rms": "RMS"}


def lines(result: dict[str, Any]) -> list[str]:
    """Return the lines of a result as `comparison.run` made it: both models, the figures, and the noise floor."""
    text = result["text"]
    head = [
        f"{side}: {result[side]['model']}, {result[side]['numerics']['weights']['dtype']}, "
        f"{result[side]['numerics']['weights']['scheme']}"
        for side in ("reference", "candidate")
    ]
    counted = (
        f"text: {text['source']}, {text['positions']:,} predictions in {text['windows']:,} windows of {text['window']} tokens"
    )
    rows = [("", "value", "95 % interval"), *_figures(result), *_buckets(result)]
    return [*head, counted, "", *_align(rows), "", *_layers(result), *_floors(result["noise_floor"])]


def _figures(result: dict[str, Any]) -> Iterator[Row]:
    for name, title in NAMES.items():
        values, intervals = result[name], result["ci95"][name]
        if isinstance(values, dict):
            for part, value in values.items():
                yield f"{title}, {PARTS.get(part, part)}", _number(value), _interval(intervals[part])
        elif values is not None:
            yield title, _number(values), _interval(intervals)


def _buckets(result: dict[str, Any]) -> Iterator[Row]:
    for bucket in result["kl_by_confidence"]:
        title = f"KL, reference {bucket['from']:.0%} to {bucket['to']:.0%} sure ({bucket['positions']:,})"
        yield title, _number(bucket["kl_mean"]), _interval(bucket["ci95"]["kl_mean"])


def _layers(result: dict[str, Any]) -> Iterator[str]:
    """Yield the layers that cost most."""
    if "per_layer" in result:
        yield "layers whose outputs are furthest off (relative RMS, for the reference's inputs):"
        for layer in costliest(result["per_layer"]):
            weights = "" if layer["weights"] is None else f", weights {_number(layer['weights'])}"
            yield f"  layer {layer['layer']}: output {_number(layer['output'])}{weights}"
        yield ""


def _floors(floors: dict[str, Any]) -> Iterator[str]:
    for floor in floors.values():
        kl, agreement = floor["kl"]["mean"], floor["top1_agreement"]
        yield (
            f"noise floor, {floor['what']}: mean KL {_number(kl)}, most likely token equal {agreement:.4g} "
            f"({floor['positions']:,} predictions)"
        )


def _number(value: float) -> str:
    return f"{value:.4g}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.4g} to {bounds[1]:.4g}"


def _align(rows: Sequence[Row]) -> list[str]:
    name, value, interval = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [f"{row[0]:<{name}}  {row[1]:>{value}}  {row[2]:>{interval}}" for row in rows]
