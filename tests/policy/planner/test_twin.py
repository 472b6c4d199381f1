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
from flexgen_helm.schedule.operations import ORDERS, Order
from flexgen_helm.types import TIERS, Shares, Tier
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


@settings(derandomize=True, max_examples=120, deadline=None)
@given(st.data(), durations(), st.sampled_from(sorted(ORDERS)))
def test_a_sweep_takes_as_long_as_in_the_real_executor(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, durations: Durations, order: Order
) -> None:
    loads = [data.draw(sweeps(durations.plan.space.own_memory)) for _ in range(2)] * 2
    folder: Path = tmp_path_factory.getbasetemp()
    clock = Fluid(duplex=durations.profile.duplex)
    replay = Replay(durations, clock, order=order)
    predicted = [replay.sweep(load) for load in loads]
    assert predicted == pytest.approx(measured(durations, loads, order, folder), rel=0.02)


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
