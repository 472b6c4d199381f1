"""Stages of a pipeline: contiguous ranges of layers whose costs are balanced. No torch.

A pipeline is as fast as its slowest stage, so the largest cost of a stage is what counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from flexgen_helm.errors import PolicyError
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.schedule.operations import head_unit

UNITS = 2**40
"""Parts of the largest cost in which costs are counted: sums of integers are exact, so equal loads are equal."""

LOGITS_SHARE = 0.25
"""Time of rows whose tokens all need logits, as a share of that of all rows, where the machine and the jobs are not known.

It is 0.3 for prompts four times as long as their answers (measured on a CPU, runs/LOG.md), less for longer prompts, and 1 where
prompts are scored.
"""


def balanced(costs: Sequence[float], stages: int, *, first: float = 0.0, last: float = 0.0) -> tuple[range, ...]:
    """Divide layers into ranges of which the most expensive one is as cheap as possible.

    Of several such divisions it is the one with the least sum of squares of the loads; of these, the one with the longest first
    range, then the longest second one, and so on. It is exact: a dynamic programme of O(stages * layers^2) steps.

    Args:
        costs: Cost of each layer, in any unit; not negative.
        stages: Number of ranges.
        first: What the first stage has to do beside its layers.
        last: Likewise the last stage, such as the output head.

    Returns:
        The ranges in order. None is empty.

    Raises:
        PolicyError: If there are fewer layers than stages, or no stage.
        ValueError: If a cost is negative or not finite.
    """
    extra = [0.0] * stages
    if stages > 0:
        extra[0] += first
        extra[-1] += last
    return balanced_over([costs] * max(1, stages), extra)


def balanced_over(costs: Sequence[Sequence[float]], extra: Sequence[float]) -> tuple[range, ...]:
    """Divide layers as `balanced` does, over machines on which they cost differently.

    Args:
        costs: For each stage the cost of each layer of the model there, in one unit for all; not negative.
        extra: What each stage has to do beside its layers.
    """
    stages, count = len(extra), len(costs[0])
    if not 1 <= stages <= count:
        raise PolicyError(
            f"{count} layers cannot be divided into {stages} stages, since each stage computes at least one layer. Take 1 "
            f"to {count} stages."
        )
    listed = [*(cost for each in costs for cost in each), *extra]
    if not all(0 <= cost < math.inf for cost in listed):
        raise ValueError(f"costs must be finite and not negative: {listed}")
    unit = max(listed) / UNITS or 1.0
    loads = _Loads(
        [[0, *accumulate(round(cost / unit) for cost in each)] for each in costs], [round(each / unit) for each in extra]
    )
    stops = _stops(loads, _largest(loads))
    return tuple(range(start, stop) for start, stop in zip([0, *stops], stops, strict=False))


def layer_costs(shapes: ModelShapes) -> list[float]:
    """Return the cost of each layer without a profile of the machine, as a share of all layers.

    It is the larger of its share of the products and its share of the bytes, since either may bind: in a mixture of experts, a
    layer is read whole but multiplies a token by few of its weights.
    """
    return [max(_shares_of(shapes, j)) for j in range(shapes.num_layers)]


def head_cost(shapes: ModelShapes, *, share: float = 1.0) -> float:
    """Return the cost of the output head in the unit of `layer_costs`.

    Args:
        shapes: Sizes of the model.
        share: Tokens whose logits are needed, as a share of all that are computed: 1 where sweeps only decode.
    """
    products, num_bytes = _shares_of(shapes, head_unit(shapes.num_layers))
    return max(share * products, num_bytes)


def stage_costs(shapes: ModelShapes) -> tuple[tuple[float, ...], float]:
    """Return the costs of the layers and of the head by which layers are divided where no machine is known."""
    return tuple(layer_costs(shapes)), head_cost(shapes, share=LOGITS_SHARE)


def _shares_of(shapes: ModelShapes, j: int) -> tuple[float, float]:
    """Return the products and the bytes of a unit, as shares of those of all layers. A tied head has no bytes of its own."""
    layers = range(shapes.num_layers)
    products = shapes.products_of(j) / sum(map(shapes.products_of, layers))
    return products, shapes.carried_bytes.get(j, 0) / sum(shapes.carried_bytes[i] for i in layers)


class _Loads(NamedTuple):
    """Integers for `UNITS`.

    Attributes:
        sums: For each stage the cost of the layers before each one, and of all.
        extra: What each stage has to do beside its layers.
    """

    sums: list[list[int]]
    extra: list[int]

    @property
    def end(self) -> int:
        """The number of layers."""
        return len(self.sums[0]) - 1

    def of(self, s: int, start: int, stop: int) -> int:
        """Return the load of stage s with the layers from start to before stop."""
        return self.sums[s][stop] - self.sums[s][start] + self.extra[s]


def _largest(loads: _Loads) -> int:
    """Return the least possible cost of the most expensive stage."""
    end, stages = loads.end, len(loads.extra)
    best: list[float] = [*[math.inf] * end, 0]
    """The least largest cost of the stages that begin with each layer; of none at the end."""
    for s in reversed(range(stages)):
        left = stages - s - 1
        best = [
            min((max(loads.of(s, start, stop), best[stop]) for stop in range(start + 1, end - left + 1)), default=math.inf)
            for start in range(end + 1)
        ]
    return int(best[0])


def _stops(loads: _Loads, bound: int) -> list[int]:
    """Return the ends of the ranges with the least sum of squares of loads that are all within a bound."""
    end, stages = loads.end, len(loads.extra)

    @cache
    def best(s: int, start: int) -> tuple[float, int]:
        """Return the least sum of squares of stage s and those behind it, and the negative end of stage s."""
        if s == stages:
            return (0 if start == end else math.inf), -start
        found: tuple[float, int] = (math.inf, -end)
        for stop in range(start + 1, end - (stages - s - 1) + 1):
            load = loads.of(s, start, stop)
            if load > bound:
                break
            found = min(found, (load * load + best(s + 1, stop)[0], -stop))
        return found

    stops: list[int] = []
    for s in range(stages):
        stops.append(-best(s, stops[-1] if stops else 0)[1])
    return stops
