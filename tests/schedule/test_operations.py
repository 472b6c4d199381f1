"""Orders of a sweep's operations."""

from __future__ import annotations

import pytest

from flexgen_helm.schedule.operations import ORDERS, Operation, Order


@pytest.mark.parametrize("order", ORDERS)
def test_every_square_is_computed_once_and_after_what_it_needs(order: Order) -> None:
    operations = list(ORDERS[order](4, 3))
    squares = [(o.j, o.k) for o in operations if o.kind == "compute"]
    assert sorted(squares) == [(j, k) for j in range(4) for k in range(3)]
    for j, k in squares:
        before = squares[: squares.index((j, k))]
        assert j == 0 or (j - 1, k) in before
        assert k == 0 or (j, k - 1) in before


@pytest.mark.parametrize(("order", "loads"), [("zigzag", 4), ("row", 12)])
def test_columns_load_each_layer_once_and_rows_load_it_once_each(order: Order, loads: int) -> None:
    operations = list(ORDERS[order](4, 3))
    assert sum(o.kind == "load_weights" for o in operations) == loads
    loaded = -1
    for operation in operations:
        loaded = operation.j if operation.kind == "load_weights" else loaded
        assert operation.kind == "load_weights" or operation.j == loaded
    assert operations[0] == Operation("load_weights", 0)
