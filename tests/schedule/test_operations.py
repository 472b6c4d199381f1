"""Orders of a sweep's operations: what each needs has happened before it, whatever is streamed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_helm.schedule.operations import ORDERS, Operation, Order, head_unit, sweep_operations

SWEEPS = {"order": st.sampled_from(sorted(ORDERS)), "num_layers": st.integers(1, 6), "num_rows": st.integers(1, 4)}


@given(**SWEEPS)
def test_every_square_is_computed_once_and_after_what_it_needs(order: Order, num_layers: int, num_rows: int) -> None:
    squares = [(o.j, o.k) for o in sweep_operations(order, num_layers, num_rows) if o.kind == "compute"]
    assert sorted(squares) == [(j, k) for j in range(num_layers) for k in range(num_rows)]
    for j, k in squares:
        before = squares[: squares.index((j, k))]
        assert j == 0 or (j - 1, k) in before
        assert k == 0 or (j, k - 1) in before


@pytest.mark.parametrize(("order", "loads"), [("zigzag", 4), ("row", 12)])
def test_columns_load_each_layer_once_and_rows_load_it_once_each(order: Order, loads: int) -> None:
    operations = list(sweep_operations(order, 4, 3, streamed=range(4), num_slots=1))
    assert sum(o.kind == "release_weights" for o in operations) == loads
    assert operations[6] == Operation("load_weights", 0)


@given(**SWEEPS, data=st.data())
def test_rows_are_recorded_before_anything_is_loaded_and_the_head_comes_last(
    order: Order, num_layers: int, num_rows: int, data: st.DataObject
) -> None:
    head = head_unit(num_layers)
    streamed = data.draw(st.sets(st.integers(0, head)))
    operations = list(sweep_operations(order, num_layers, num_rows, streamed=streamed, num_slots=min(1, len(streamed))))
    recorded = [step for k in range(num_rows) for step in (Operation("record", -1, k), Operation("store_hidden", -1, k))]
    assert operations[: 2 * num_rows] == recorded
    assert sum(o.kind == "record" for o in operations) == num_rows
    behind = operations[operations.index(Operation("finish", head)) + 1 :]
    if head in streamed:
        assert [o.kind for o in behind] == ["release_weights", "load_weights"]
        assert behind[0].j == head
    else:
        assert behind == []


@given(**SWEEPS, data=st.data())
def test_parts_of_the_layers_together_compute_what_all_of_them_do(
    order: Order, num_layers: int, num_rows: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, num_layers - 1))
    stages = [list(sweep_operations(order, num_layers, num_rows, layers=part)) for part in (range(cut), range(cut, num_layers))]
    whole = list(sweep_operations(order, num_layers, num_rows))
    for kind in ("compute", "store_cache", "load_cache"):
        found = [o for stage in stages for o in stage if o.kind == kind]
        assert sorted(found) == sorted(o for o in whole if o.kind == kind)
    assert [[o.kind for o in stage].count("finish") for stage in stages] == [0, 1]
    if cut:
        assert not any(o.kind == "store_hidden" and o.j == cut - 1 for o in stages[0])  # it goes to the other stage
        assert [o for o in stages[1] if o.kind == "record"] == [Operation("record", cut - 1, k) for k in range(num_rows)]


@given(**SWEEPS, data=st.data())
def test_streamed_weights_are_there_when_computed_and_never_more_of_them_than_slots(
    order: Order, num_layers: int, num_rows: int, data: st.DataObject
) -> None:
    streamed = data.draw(st.sets(st.integers(0, num_layers), min_size=1))
    num_slots = data.draw(st.integers(1, len(streamed)))
    loaded: list[int] = []
    for sweep in range(3):
        operations = list(sweep_operations(order, num_layers, num_rows, streamed=streamed, num_slots=num_slots))
        loads = 0
        for operation in operations:
            if operation.kind == "load_weights":
                loads += 1
                if sweep and loads <= num_slots:  # on the device already, since the end of the last sweep
                    assert operation.j in loaded
                else:
                    loaded.append(operation.j)
            elif operation.kind == "release_weights":
                loaded.remove(operation.j)
            assert operation.kind != "compute" or operation.j not in streamed or operation.j in loaded
            assert len(loaded) <= num_slots
        releases = [o.j for o in operations if o.kind == "release_weights"]
        assert set(releases) == streamed


@given(**SWEEPS)
def test_a_row_is_loaded_before_it_is_computed_and_stored_after(order: Order, num_layers: int, num_rows: int) -> None:
    operations = list(sweep_operations(order, num_layers, num_rows))
    on_device: set[int] = set()
    caches: set[tuple[int, int]] = set()
    for kind, j, k in operations:
        if kind == "load_hidden":
            assert k not in on_device
            on_device.add(k)
        elif kind == "load_cache":
            caches.add((j, k))
        elif kind == "compute":
            assert k in on_device
            assert (j, k) in caches
        elif kind == "store_cache":
            caches.remove((j, k))
        elif kind == "record":
            on_device.add(k)
        elif kind == "store_hidden":
            on_device.remove(k)
            assert j < num_layers - 1
    assert not caches
    assert on_device == set(range(num_rows))


def test_a_transfer_begins_before_the_computation_that_hides_it() -> None:
    operations = list(sweep_operations("zigzag", 2, 2, streamed=[0, 1], num_slots=2))
    assert operations.index(Operation("load_cache", 0, 1)) < operations.index(Operation("compute", 0, 0))
    assert operations.index(Operation("load_weights", 1)) < operations.index(Operation("compute", 0, 0))
    assert operations.index(Operation("load_cache", 1, 0)) < operations.index(Operation("compute", 0, 1))
