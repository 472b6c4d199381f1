"""Dependencies of operations, against the data that each of them reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_helm.schedule.dependencies import needs, resources
from flexgen_helm.schedule.operations import ORDERS, Operation, OperationKind, Order, sweep_operations
from flexgen_helm.types import RESOURCES, Tier

SWEEPS = {"order": st.sampled_from(sorted(ORDERS)), "num_layers": st.integers(1, 5), "num_rows": st.integers(1, 5)}


def all_needs(operations: list[Operation], suspending: frozenset[int]) -> list[frozenset[int]]:
    """For each operation all that must have ended, what is needed in turn included."""
    found: list[frozenset[int]] = []
    for needed in needs(operations, suspending=suspending):
        found.append(needed.union(*(found[number] for number in needed)))
    return found


@given(**SWEEPS, data=st.data())
def test_what_an_operation_reads_is_there(order: Order, num_layers: int, num_rows: int, data: st.DataObject) -> None:
    suspending = data.draw(st.frozensets(st.integers(0, num_rows - 1)))
    streamed = data.draw(st.frozensets(st.integers(0, num_layers)))
    num_slots = data.draw(st.integers(1, len(streamed))) if streamed else 0
    operations = list(sweep_operations(order, num_layers, num_rows, streamed=streamed, num_slots=num_slots))
    loads: dict[int, int] = {}
    for number, needed in enumerate(all_needs(operations, suspending)):
        kind, j, k = operations[number]
        before = {operations[other] for other in needed}
        if kind == "load_weights":
            loads[j] = number
        elif kind == "compute":
            assert Operation("record", -1, k) in before
            assert j == 0 or Operation("compute", j - 1, k) in before
            assert {Operation("compute", j, other) for other in range(k) if other not in suspending} <= before
            assert Operation("load_cache", j, k) in before
            assert j not in streamed or loads[j] in needed
        elif kind in ("store_cache", "store_hidden"):
            assert (Operation("compute", j, k) if j >= 0 else Operation("record", j, k)) in before
        elif kind in ("load_cache", "load_hidden"):
            earlier = [o for o in operations[:number] if o.kind == "compute" and o.k == k]
            assert set(earlier) <= before
        elif kind == "release_weights" and j < num_layers:
            assert {o for o in operations[loads[j] : number] if o.kind == "compute" and o.j == j} <= before
        elif kind == "finish":
            assert {Operation("compute", num_layers - 1, row) for row in range(num_rows)} <= before
            assert j not in streamed or loads[j] in needed


@given(**SWEEPS, data=st.data())
def test_a_slot_is_empty_when_it_is_filled(order: Order, num_layers: int, num_rows: int, data: st.DataObject) -> None:
    streamed = data.draw(st.frozensets(st.integers(0, num_layers), min_size=1))
    num_slots = data.draw(st.integers(1, len(streamed)))
    operations = list(sweep_operations(order, num_layers, num_rows, streamed=streamed, num_slots=num_slots))
    found = all_needs(operations, frozenset())
    loads = [number for number, operation in enumerate(operations) if operation.kind == "load_weights"]
    releases = [number for number, operation in enumerate(operations) if operation.kind == "release_weights"]
    for load, release in zip(loads[num_slots:], releases, strict=True):
        assert release in found[load]


def test_a_suspended_call_holds_up_its_own_row_only() -> None:
    operations = list(sweep_operations("zigzag", 2, 4))
    found = all_needs(operations, frozenset((0, 1)))
    first = operations.index(Operation("compute", 0, 0))

    def needed(operation: Operation) -> bool:
        return first in found[operations.index(operation)]

    assert not needed(Operation("compute", 0, 1))
    assert needed(Operation("store_cache", 0, 0))
    assert not needed(Operation("load_cache", 0, 2))
    assert needed(Operation("compute", 0, 2))  # the second one is suspended behind it
    assert needed(Operation("load_cache", 1, 0))


@pytest.mark.parametrize(
    ("kind", "tier", "own_memory", "expected"),
    [
        ("compute", "host", True, ("device",)),
        ("finish", "disk", True, ("device",)),
        ("load_weights", "device", True, ()),
        ("load_weights", "disk", True, ("disk_read", "host_to_device")),
        ("load_weights", "disk", False, ("disk_read",)),
        ("load_cache", "host", True, ("host_to_device",)),
        ("store_cache", "host", True, ("device_to_host",)),
        ("store_hidden", "disk", True, ("device_to_host", "disk_write")),
        ("store_hidden", "host", False, ()),
        ("release_weights", "disk", True, ()),
    ],
)
def test_links_between_tiers_are_busy(kind: OperationKind, tier: Tier, own_memory: bool, expected: tuple[str, ...]) -> None:
    assert resources(kind, tier, own_memory=own_memory) == expected
    assert set(expected) <= set(RESOURCES)
