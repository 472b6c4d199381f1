"""FlexGen's theory (sections 4.1, 4.2 and appendix A.2) on our own generators of operations.

A square is (row, column): column ``i * l + j`` is layer j of token i. K and V are counted in tokens of one layer: the prompt
gives each layer ``s`` of them, every later token one more. A row drops all of them once its last square is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple, get_args

import numpy as np
import pytest

from flexgen_helm.schedule.operations import Operation, Order, sweep_operations


class Instance(NamedTuple):
    """Layers l, prompt tokens s and new tokens n of every row."""

    l: int  # noqa: E741  # the paper's
    s: int
    n: int

    @property
    def columns(self) -> int:
        return self.l * self.n

    @property
    def row_peak(self) -> int:
        """K and V of a row when its last square is computed."""
        return self.l * (self.s + self.n - 1)

    def held(self, computed: int) -> int:
        """K and V of a row after so many squares, before those of a finished row are dropped."""
        token, layers = divmod(computed, self.l)
        whole = self.l * (self.s + token - 1) if token else 0
        return whole + layers * (1 if token else self.s)


class Walk(NamedTuple):
    """What a path takes."""

    loads: int
    peak: int
    reserved: int
    """Most K and V of live rows between two tokens, with room for the next one."""


def walk(instance: Instance, squares: Iterable[tuple[int, int]]) -> Walk:
    """Follow a path with one layer's weights on the device at a time, and check that it is valid."""
    computed: Counter[int] = Counter()
    loads = peak = reserved = held = inside = rows = ended = 0
    layer = None
    for row, column in squares:
        assert column == computed[row], "a square follows the one to its left"
        if column % instance.l != layer:
            layer = column % instance.l
            loads += 1
        rows += column == 0
        computed[row] += 1
        held += instance.held(column + 1) - instance.held(column)
        peak = max(peak, held)
        inside += (column % instance.l == 0) - (computed[row] % instance.l == 0)
        if computed[row] == instance.columns:
            held, ended = held - instance.row_peak, ended + 1
        if not inside:
            reserved = max(reserved, held + instance.l * (rows - ended))
    assert rows == ended == len(computed), "every row is computed to its end"
    return Walk(loads, peak, reserved)


def sweeps(order: Order, instance: Instance, num_rows: int) -> Iterator[list[Operation]]:
    """Generate the operations of a block's sweeps, each without its last load, which is of the next sweep's first layer."""
    for _ in range(instance.n):
        operations = list(sweep_operations(order, instance.l, num_rows, streamed=range(instance.l), num_slots=1))
        last = max(number for number, operation in enumerate(operations) if operation.kind == "load_weights")
        yield operations[:last] + operations[last + 1 :]


def real_path(order: Order, instance: Instance, num_rows: int) -> Iterator[tuple[int, int]]:
    for token, operations in enumerate(sweeps(order, instance, num_rows)):
        yield from ((k, token * instance.l + j) for kind, j, k in operations if kind == "compute")


def diagonal_path(instance: Instance, num_rows: int) -> Iterator[tuple[int, int]]:
    """Rows staggered by a token (section 4.2): each diagonal loads every layer once; one row begins first, one ends last."""
    for diagonal in range(num_rows + instance.n - 1):
        live = [row for row in reversed(range(num_rows)) if 0 <= diagonal - row < instance.n]
        yield from ((row, (diagonal - row) * instance.l + j) for j in range(instance.l) for row in live)


INSTANCES = [Instance(3, 4, 5), Instance(2, 1, 7), Instance(4, 9, 2)]


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_zigzag_loads_each_layer_once_a_token_and_row_order_once_a_token_and_row(instance: Instance, num_rows: int) -> None:
    """Section 4.2: weights are loaded n times for a block, and ``num_gpu_batches`` times as often row by row."""

    def loads(order: Order) -> int:
        return sum(operation.kind == "load_weights" for sweep in sweeps(order, instance, num_rows) for operation in sweep)

    assert loads("zigzag") == instance.n * instance.l
    assert loads("row") == num_rows * instance.n * instance.l
    assert walk(instance, real_path("zigzag", instance, num_rows)).loads == loads("zigzag")


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("order", get_args(Order))
def test_cache_traffic_of_a_row_is_the_same_in_both_orders(instance: Instance, order: Order) -> None:
    """Section 4.2: ``l (s n + n (n - 1) / 2)`` tokens of K and V are read for a row, at s + i for token i."""
    num_rows, read = 3, Counter[int]()
    for token, operations in enumerate(sweeps(order, instance, num_rows)):
        for k in (operation.k for operation in operations if operation.kind == "load_cache"):
            read[k] += instance.s + token
    tokens = instance.s * instance.n + instance.n * (instance.n - 1) // 2
    assert read == dict.fromkeys(range(num_rows), instance.l * tokens)


@pytest.mark.parametrize("instance", INSTANCES)
def test_hidden_states_are_stored_and_loaded_between_all_layers_in_zigzag_only(instance: Instance) -> None:
    """Section 4.2: every square's hidden state is moved twice; a row that goes on at once keeps it on the device."""
    moved = {order: Counter(kind for sweep in sweeps(order, instance, 4) for kind, _, _ in sweep) for order in get_args(Order)}
    squares = 4 * instance.n * instance.l
    assert moved["zigzag"]["load_hidden"] == moved["zigzag"]["store_hidden"] == squares
    assert moved["row"]["load_hidden"] == moved["row"]["store_hidden"] == squares // instance.l


@pytest.mark.parametrize(
    ("s", "n", "to_bound", "to_diagonal"),
    [
        (512, 32, 1.029, 1.064),
        (1024, 32, 1.015, 1.048),
        (512, 128, 1.110, 1.120),
        (128, 128, 1.332, 1.344),
        pytest.param(32, 512, 1.889, 1.893, marks=pytest.mark.slow),
        pytest.param(1, 512, 1.996, 2.000, marks=pytest.mark.slow),
    ],
)
def test_memory_of_zigzag_and_diagonal_blocks(s: int, n: int, to_bound: float, to_diagonal: float) -> None:
    """Appendix A.2: in equal memory a diagonal holds ``2 (s + n) / (2 s + n)`` times as many rows, for large n."""
    instance = Instance(2, s, n)
    zigzag, diagonal = walk(instance, real_path("zigzag", instance, 1)), walk(instance, diagonal_path(instance, n))
    assert diagonal.peak / n == pytest.approx(instance.l * (s + (n - 1) / 2))
    assert n * zigzag.peak / diagonal.peak == pytest.approx(to_bound, abs=5e-4)
    per_row = instance.l * (s + n)  # for which a zig-zag block has room, the last token's K and V too
    assert zigzag.peak + instance.l == per_row
    assert diagonal.reserved == instance.l * (2 * s + n) * (n - 1) // 2
    assert n * per_row / diagonal.reserved == pytest.approx(to_diagonal, abs=5e-4)


def test_a_diagonal_loads_each_layer_once_for_every_row_that_ends() -> None:
    instance, num_rows = Instance(3, 4, 5), 200
    loads = walk(instance, diagonal_path(instance, num_rows)).loads
    assert loads == instance.l * (num_rows + instance.n - 1)


State = tuple[int, ...]
"""Squares computed of each row that has begun and not ended, sorted (definition A.1)."""


class Step(NamedTuple):
    """What one load of a layer is used for: the state before, the state behind, rows that end."""

    source: int
    target: int
    ended: int


def steps_from(instance: Instance, state: State, layer: int, capacity: int, most_rows: int) -> Iterator[tuple[State, int]]:
    """Yield every use of one load: each row may advance by one square, since its next square is another layer's."""
    here = Counter(count for count in state if count % instance.l == layer)
    if layer == 0 and len(state) < most_rows:
        here[0] = most_rows - len(state)
    chosen = sorted(here, reverse=True)  # rows that end come first, because they free memory
    for counts in product(*(range(here[count] + 1) for count in chosen)):
        held = sum(map(instance.held, state))
        ended, fits, after = 0, True, list(state)
        for count, number in zip(chosen, counts, strict=True):
            for _ in range(number):
                held += instance.held(count + 1) - instance.held(count)
                fits &= held <= capacity
                if count:
                    after.remove(count)
                if count + 1 == instance.columns:
                    held, ended = held - instance.row_peak, ended + 1
                else:
                    after.append(count + 1)
        if any(counts) and fits:
            yield tuple(sorted(after)), ended


def all_steps(instance: Instance, capacity: int, most_rows: int) -> list[Step]:
    numbers: dict[State, int] = {(): 0}
    queue: list[State] = [()]
    steps: list[Step] = []
    for state in queue:
        for layer in range(instance.l):
            for after, ended in steps_from(instance, state, layer, capacity, most_rows):
                if after not in numbers:
                    numbers[after] = len(numbers)
                    queue.append(after)  # the queue grows while it is walked
                steps.append(Step(numbers[state], numbers[after], ended))
    return steps


def least_loads_per_row(instance: Instance, capacity: int, most_rows: int) -> float:
    """Return the least loads of a layer for each row that ends: the cycle of states with the least ratio (theorem A.3).

    A cycle is better than a ratio if its loads less the ratio for each row that ends is negative. The ratio of such a cycle
    is tried next, until there is none (Dinkelbach 1967).
    """
    source, target, ended = np.array(all_steps(instance, capacity, most_rows)).T
    ratio = float(instance.columns * most_rows)
    while (better := _better_cycle(source, target, ended, ratio)) is not None:
        ratio = better
    return ratio


def _better_cycle(source: np.ndarray, target: np.ndarray, ended: np.ndarray, ratio: float) -> float | None:
    """Return the ratio of a cycle whose ratio is less, by Bellman and Ford's algorithm; None if there is none."""
    cost = 1 - ratio * ended
    size = max(source.max(), target.max()) + 1
    distance, parent = np.zeros(size), np.full(size, -1)
    for _ in range(len(distance) + 1):
        reached = distance[source] + cost
        order = np.lexsort((reached, target))
        first = order[np.unique(target[order], return_index=True)[1]]
        shorter = first[reached[first] < distance[target[first]] - 1e-9]
        if not len(shorter):
            return None
        distance[target[shorter]], parent[target[shorter]] = reached[shorter], shorter
        cycle = _cycle(parent, source, int(target[shorter[0]]))
        if cycle:
            return len(cycle) / sum(int(ended[step]) for step in cycle)
    raise AssertionError("a shortest path has no more steps than there are states")


def _cycle(parent: np.ndarray, source: np.ndarray, state: int) -> list[int]:
    """Return the steps of the cycle into which the parents of a state lead, if they do."""
    seen: dict[int, int] = {}
    path: list[int] = []
    while state not in seen:
        seen[state] = len(path)
        if parent[state] < 0:
            return []
        path.append(int(parent[state]))
        state = int(source[parent[state]])
    return path[seen[state] :]


@pytest.mark.parametrize("rows_in_memory", [1, 2, 3])
@pytest.mark.parametrize(
    "instance", [Instance(*sizes) for sizes in ((2, 1, 2), (2, 2, 2), (2, 1, 3), (2, 2, 3), (3, 1, 2), (3, 2, 2))]
)
def test_zigzag_loads_at_most_twice_as_many_weights_as_any_schedule(instance: Instance, rows_in_memory: int) -> None:
    """Theorem 4.1. Only weights count: K and V are moved equally often in every order, hidden states much less."""
    capacity = rows_in_memory * instance.row_peak
    assert walk(instance, real_path("zigzag", instance, rows_in_memory)).peak <= capacity
    zigzag = walk(instance, real_path("zigzag", instance, rows_in_memory)).loads / rows_in_memory
    least = least_loads_per_row(instance, capacity, most_rows=rows_in_memory + 2)
    assert least <= zigzag <= 2 * least


def test_the_worst_ratio_of_the_tiny_instances() -> None:
    """By hand for l = 2, n = 2, s = 1 and three rows in memory: 4 loads for 5 rows, where a zig-zag block has 4 for 3."""
    assert least_loads_per_row(Instance(2, 1, 2), 12, most_rows=6) == pytest.approx(4 / 5)
