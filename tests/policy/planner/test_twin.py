"""The simulator against its twin: what the real executors do on a virtual clock with paced links."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.machine.profile import Rate
from flexgen_helm.policy.planner.durations import Durations
from flexgen_helm.policy.planner.fluid import Fluid
from flexgen_helm.policy.planner.loads import Pages, RowLoad, SweepLoad
from flexgen_helm.policy.planner.replay import Replay
from flexgen_helm.schedule.operations import ORDERS, Order, sweep_operations
from flexgen_helm.types import ON_DEVICE, TIERS, Shares, Tier
from tests.policy.planner.made import KIB, MIB, machine_with, plan_with, policy_with, shapes_with
from tests.policy.planner.twin import measured

THIRDS = st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any)


@st.composite
def durations(draw: st.DrawFn) -> Durations:
    num_layers = draw(st.integers(1, 6))
    sizes = st.sampled_from([4 * KIB, 64 * KIB, 400 * KIB])
    fields: dict[str, Any] = {"head": draw(st.none() | sizes), "layer": draw(sizes)}
    own_memory = draw(st.booleans())
    form = draw(st.sampled_from(["plain", "packed", "coded", "lossless"]))
    if form != "plain":
        fields |= {"is_packed": form != "lossless", "is_coded": form != "packed", "weight_format": "w4"}
    shapes = shapes_with(num_layers, num_kv_heads=64, head_dim=256 * draw(st.sampled_from([1, 8])), **fields)
    units: dict[int, Tier] = {j: draw(st.sampled_from(TIERS)) for j in shapes.bound_bytes}
    shares = draw(THIRDS)
    hidden: Shares = tuple(share / sum(shares) for share in shares)  # type: ignore[assignment]
    policy = policy_with(hidden=hidden, prefetch=draw(st.integers(1, 3)), overlap=draw(st.booleans()))
    machine = machine_with(
        duplex=draw(st.sampled_from([0.5, 0.8, 1.0])), own_memory=own_memory, is_gpu=draw(st.booleans()) and own_memory
    )
    return Durations(plan_with(shapes, policy, units, own_memory=own_memory), machine)


@st.composite
def pages(draw: st.DrawFn, own_memory: bool) -> Pages:
    tiers: list[Tier] = ["host", "disk"] if own_memory else ["disk"]
    count = draw(st.integers(0, 30))
    return ((draw(st.sampled_from(tiers)), "exact", count),) if count else ()


@st.composite
def sweeps(draw: st.DrawFn, own_memory: bool) -> SweepLoad:
    rows: list[RowLoad] = []
    for _ in range(draw(st.integers(1, 5))):
        decode = draw(st.booleans())
        stages = draw(st.booleans())
        brought, taken = (draw(pages(own_memory)) if stages else () for _ in range(2))
        keys = draw(st.integers(0, 200)), draw(st.integers(0, 4000))
        on_host = decode and own_memory and draw(st.booleans())
        size = 16 if decode else 32
        rows.append(RowLoad("decode" if decode else "prefill", size, *keys, brought, taken, stages, on_host))
    return SweepLoad(tuple(rows), draw(st.integers(0, sum(row.size for row in rows))), 0, 0)


SWEEPS = given(st.data(), durations(), st.sampled_from(sorted(ORDERS)))


@settings(derandomize=True, max_examples=40, deadline=None)
@SWEEPS
def test_a_sweep_takes_as_long_as_in_the_real_executor(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, durations: Durations, order: Order
) -> None:
    compare(tmp_path_factory, data, durations, order)


@pytest.mark.slow
@settings(derandomize=True, max_examples=240, deadline=None)
@SWEEPS
def test_many_sweeps_take_as_long_as_in_the_real_executor(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, durations: Durations, order: Order
) -> None:
    compare(tmp_path_factory, data, durations, order)


def compare(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, durations: Durations, order: Order) -> None:
    """Compare the replay of sweeps with the real executor on a virtual clock."""
    loads = [data.draw(sweeps(durations.plan.space.own_memory)) for _ in range(2)] * 2
    folder: Path = tmp_path_factory.getbasetemp()
    clock = Fluid(duplex=durations.profile.duplex)
    replay = Replay(durations, clock, order=order)
    predicted = [replay.sweep(load) for load in loads]
    found = measured(durations, loads, order, folder)
    assert predicted == pytest.approx([sweep.begin + sweep.seconds for sweep in found], rel=0.02)
    for sweep in found:  # one device, which computes or waits
        waited = sum(sweep.device_wait_seconds.values())
        assert sweep.busy_seconds.get("device", 0.0) + waited == pytest.approx(sweep.seconds)


def test_pages_travel_while_others_are_read() -> None:
    """Disk and link work at the same time on all but the first and the last piece."""
    durations = Durations(plan_with(shapes_with(1), policy_with()), machine_with(disk_read=Rate(1e7)))
    num_pages = 64 * MIB // (2 * 2 * 8 * 32 * 2)
    (load,) = [RowLoad("decode", 16, 0, 0, (("disk", "exact", num_pages),), (), True)]
    pieces = durations.load_cache(load)
    seconds = sum(piece[0].seconds for piece in pieces)
    clock = Fluid()
    end = Replay(durations, clock).sweep(SweepLoad((load,), 0, 0, 0))
    assert len(pieces) > 1
    assert end >= seconds + pieces[-1][1].seconds


@pytest.mark.parametrize(("rate", "binds"), [(4e6, True), (4e7, False)])
def test_a_sweep_from_disk_waits_for_what_is_not_hidden_behind_computation(rate: float, binds: bool, tmp_path: Path) -> None:
    """Four layers of 400 KiB, read ahead: either the disk never rests, or it is always done before."""
    shapes = shapes_with(4, layer=400 * KIB)
    plan = plan_with(shapes, policy_with(prefetch=1), dict.fromkeys(range(4), "disk"), own_memory=False)
    durations = Durations(plan, machine_with(own_memory=False, disk_read=Rate(rate)))
    row = RowLoad("decode", 16, 0, 0)
    (layer,), (head,), (record,) = durations.layer(0, row), durations.finish(16), durations.record(row)
    computing, reading = 4 * layer.seconds + head.seconds, 4 * 400 * KIB / rate
    for sweep in measured(durations, [SweepLoad((row,), 16, 0, 0)] * 3, "zigzag", tmp_path)[1:]:
        waits = {"weights": reading - computing} if binds else {"host": record.seconds}
        assert sweep.device_wait_seconds == pytest.approx(waits)
        assert sweep.seconds == pytest.approx(reading if binds else computing + record.seconds)


def test_a_layer_of_two_rows_is_loaded_once_in_row_order(tmp_path: Path) -> None:
    """Its slot is free between its rows, and another one is empty: the output head goes there."""
    shapes = shapes_with(1, head=400 * KIB, layer=400 * KIB)
    policy = policy_with(prefetch=1, overlap=False)
    durations = Durations(plan_with(shapes, policy, dict.fromkeys(range(2), "host")), machine_with())
    load = SweepLoad((RowLoad("prefill", 32, 0, 0),) * 2, 0, 0, 0)
    (sweep,) = measured(durations, [load], "row", tmp_path)
    assert sweep.bytes_moved == {"host_to_device": 2 * 400 * KIB}
    assert Replay(durations, Fluid(), order="row").sweep(load) == pytest.approx(sweep.seconds)


@pytest.mark.parametrize(
    ("row", "hidden", "cause"),
    [
        (RowLoad("decode", 16, 0, 0, (("host", "exact", 10),), (), True), ON_DEVICE, "cache"),
        (RowLoad("decode", 16, 0, 2000, on_host=True), ON_DEVICE, "cpu_attention"),
        (RowLoad("decode", 16, 0, 0), (0, 1, 0), "hidden"),
    ],
)
def test_a_single_row_waits_for_its_parts(row: RowLoad, hidden: Shares, cause: str, tmp_path: Path) -> None:
    """K and V come while the layer before is computed; attention and hidden states, of three layers, hide behind nothing."""
    shapes = shapes_with(4, num_kv_heads=64, head_dim=256)
    durations = Durations(plan_with(shapes, policy_with(hidden=hidden)), machine_with())
    stages, (record,) = durations.layer(0, row), durations.record(row)
    if cause == "cache":
        expected = 4 * durations.load_cache(row)[0][0].seconds - 3 * stages[0].seconds
    elif cause == "cpu_attention":
        expected = 4 * stages[1].seconds
    else:
        ways = (durations.hidden(row, "host", stores=stores) for stores in (True, False))
        moves = [operation for operation in sweep_operations("zigzag", 4, 1) if operation.kind == "load_hidden"]
        expected = len(moves) * sum(stage.seconds for way in ways for stage in way)
    for sweep in measured(durations, [SweepLoad((row,), 16, 0, 0)] * 2, "zigzag", tmp_path):
        assert sweep.device_wait_seconds == pytest.approx({"host": record.seconds, cause: expected})
