"""Balanced stages, against every division there is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest

from flexgen_helm.errors import PolicyError
from flexgen_helm.policy.stages.balance import balanced, balanced_over, head_cost, layer_costs
from tests.policy.planner.made import KIB, shapes_with


def divisions(num_layers: int, stages: int) -> Iterator[tuple[range, ...]]:
    for cuts in itertools.combinations(range(1, num_layers), stages - 1):
        yield tuple(itertools.starmap(range, itertools.pairwise((0, *cuts, num_layers))))


def loads(ranges: Sequence[range], costs: Sequence[float], first: float, last: float) -> list[float]:
    found = [sum(costs[j] for j in layers) for layers in ranges]
    found[0] += first
    found[-1] += last
    return found


@pytest.mark.parametrize("seed", range(60))
def test_no_division_has_a_smaller_largest_load(seed: int) -> None:
    chance = random.Random(seed)
    num_layers = chance.randint(1, 10)
    stages = chance.randint(1, num_layers)
    costs = [chance.choice([0, 1, 1, 2, 7]) if seed % 2 else chance.random() for _ in range(num_layers)]
    first, last = chance.choice([0, 0.5, 3]), chance.choice([0, 2, 9])
    found = balanced(costs, stages, first=first, last=last)

    assert [j for layers in found for j in layers] == list(range(num_layers))
    assert len(found) == stages
    assert all(found)
    best = min(max(loads(each, costs, first, last)) for each in divisions(num_layers, stages))
    mine = loads(found, costs, first, last)
    assert max(mine) == pytest.approx(best, abs=1e-9)
    squares = min(
        sum(load**2 for load in loads(each, costs, first, last))
        for each in divisions(num_layers, stages)
        if max(loads(each, costs, first, last)) <= best + 1e-9
    )
    assert sum(load**2 for load in mine) == pytest.approx(squares, abs=1e-9)


def test_equal_layers_are_spread_and_the_first_stages_take_the_rest() -> None:
    # Ten times 0.1 would not be 1 if sums of floats were compared.
    assert [len(layers) for layers in balanced([0.1] * 10, 4)] == [3, 3, 2, 2]
    assert [len(layers) for layers in balanced([0.1] * 96, 16)] == [6] * 16
    assert balanced([0.0] * 3, 3) == (range(1), range(1, 2), range(2, 3))


def test_the_head_makes_the_last_stage_shorter() -> None:
    # 3 + 3 + 2 layers and a head of two layers: 4 + 4 + 2 would be 4, 4, 4.
    assert [len(layers) for layers in balanced([1.0] * 10, 3, last=2.0)] == [4, 4, 2]
    assert [len(layers) for layers in balanced([1.0] * 10, 3, first=3.0, last=2.0)] == [2, 5, 3]


@pytest.mark.parametrize("stages", [0, 4])
def test_as_many_layers_as_stages_are_needed(stages: int) -> None:
    with pytest.raises(PolicyError, match=r"3 layers cannot be divided into .* Take 1 to 3 stages"):
        balanced([1.0] * 3, stages)


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_costs_are_numbers(cost: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        balanced([1.0, cost], 2)


def test_a_layer_costs_its_larger_share_of_products_and_bytes() -> None:
    dense, experts = 64 * KIB, 6 * 64 * KIB
    sizes = {0: dense, 1: experts, 2: dense}
    shapes = shapes_with(3, carried_bytes=sizes, bound_bytes=sizes, layer_products={1: dense / 2})
    # Products 1:1:1, bytes 1:6:1.
    assert layer_costs(shapes) == pytest.approx([1 / 3, 6 / 8, 1 / 3])
    # The head is tied: 128 tokens of 32 elements; a layer multiplies by 32768 elements.
    assert head_cost(shapes) == pytest.approx(128 * 32 / (3 * 32768))
    assert head_cost(shapes, share=0.25) == pytest.approx(32 * 32 / (3 * 32768))


def test_a_head_of_its_own_is_read_whole_whatever_tokens_need_it() -> None:
    shapes = shapes_with(4, head=32 * KIB)
    assert head_cost(shapes, share=0.0) == pytest.approx(32 / (4 * 64))


@pytest.mark.parametrize("seed", range(40))
def test_machines_on_which_layers_cost_differently(seed: int) -> None:
    chance = random.Random(seed)
    num_layers = chance.randint(2, 9)
    stages = chance.randint(1, min(4, num_layers))
    speeds = [chance.choice([1, 1, 2, 5]) for _ in range(stages)]
    costs = [[speed * chance.choice([1, 2, 3]) for _ in range(num_layers)] for speed in speeds]
    extra = [float(chance.choice([0, 0, 3])) for _ in range(stages)]
    found = balanced_over(costs, extra)

    def load(ranges: Sequence[range]) -> list[float]:
        return [sum(costs[s][j] for j in layers) + extra[s] for s, layers in enumerate(ranges)]

    assert [j for layers in found for j in layers] == list(range(num_layers))
    assert all(found)
    best = min(max(load(each)) for each in divisions(num_layers, stages))
    assert max(load(found)) == pytest.approx(best, abs=1e-9)


def test_a_machine_that_is_half_as_fast_gets_half_as_many_layers() -> None:
    assert [len(layers) for layers in balanced_over([[1.0] * 12, [2.0] * 12], [0.0, 0.0])] == [8, 4]
    # A head of one layer on the slow machine: 9, and 6 + 2.
    assert [len(layers) for layers in balanced_over([[1.0] * 12, [2.0] * 12], [0.0, 2.0])] == [9, 3]
