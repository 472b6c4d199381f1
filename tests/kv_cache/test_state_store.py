"""Caches of single rows that rest on the host: the same bits, and all of them moved."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flexgen_helm.errors import PolicyError
from flexgen_helm.execution.overlapped import OverlappedExecutor
from flexgen_helm.kv_cache.state_store import OwnedState, StateStore
from flexgen_helm.memory.meter import Meter
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.rows.single import SingleRows, cache_bytes, check_cache_shares
from flexgen_helm.run_stats import RunStats
from flexgen_helm.schedule.operations import Order
from flexgen_helm.schedule.rows import Continuation, LogitRequest, Row, Segment, State, Sweep, pack_decode
from flexgen_helm.types import ResolvedPolicy
from tests.models import save_tiny
from tests.simulated_gpu.patches import simulated_gpu

CPU = torch.device("cpu")
POLICY = ResolvedPolicy(gpu_batch_size=16, gpu_batch_tokens=256)
PROMPTS = [tuple(range(5, 28)), tuple(range(40, 49)), tuple(range(3, 8))]
STEPS = [(9, 11, 60), (30, 31, 32), (70, 2, 9)]


def run(model: RecordedModel, store: StateStore | None, order: Order = "zigzag") -> tuple[list[Tensor], list[State]]:
    """Logits of three prompts and three steps behind each; a fourth sequence goes on behind a copy of the first."""
    executor = OverlappedExecutor(SingleRows(model, store), head_slice=16, order=order)
    found: list[Tensor] = []
    states = [State() for _ in PROMPTS]

    def sweep(rows: list[Row]) -> None:
        executor.run(Sweep(rows), lambda logit_requests, logits: found.append(logits))

    def segment(tokens: tuple[int, ...], start: int, state: State) -> Segment:
        return Segment(tokens, start, logit_requests=[LogitRequest(len(tokens) - 1, (), (Continuation(1),))], state=state)

    sweep([Row("prefill", len(p), [segment(p, 0, state)]) for p, state in zip(PROMPTS, states, strict=True)])
    prompts, steps, states = [*PROMPTS, PROMPTS[0]], [*STEPS, (1, 2, 3)], [*states, State(origin=states[0])]
    for step in range(3):
        ends = zip(prompts, steps, states, strict=True)
        sweep(pack_decode([segment((tail[step],), len(p) + step, state) for p, tail, state in ends], POLICY))
    if store is not None:
        store.settle()  # `close` drops transfers that have not begun
    executor.close()
    return found, states


@pytest.mark.parametrize("family", ["falcon", "falcon_h1", "qwen3_5_text", "deepseek_v4", "lfm2"])
def test_caches_on_the_host_change_no_bit(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RecordedModel(AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path)).eval())
    expected, _ = run(model, None)
    for share, order in ((1.0, "zigzag"), (0.5, "row")):
        meter = Meter(CPU)
        meter.begin_run()
        store = StateStore(CPU, share=share, meter=meter)
        found, states = run(model, store, order)  # type: ignore[arg-type]
        meter.end_sweep(0, 0, 0)
        stats = RunStats()
        meter.end_run(stats)
        store.close()
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        held = [cache_bytes(state.content) for state in states]
        if share == 1.0:
            assert sum(held) < stats.bytes_moved["host_to_device"] < stats.bytes_moved["device_to_host"] <= 4 * sum(held)
        else:
            assert 0 < stats.bytes_moved["device_to_host"] < 4 * sum(held) * 0.75


def test_states_travel_through_pinned_memory_without_a_wait() -> None:
    """A state that grows in three layers in turn, as the device computes it, and as the host reads it after all."""
    with simulated_gpu() as gpu:
        device = torch.device("cuda:0")
        store, owner = StateStore(device, share=1.0), State()
        states = [SimpleNamespace(keys=torch.zeros(1, 4), lists=[torch.ones(2)]) for _ in range(3)]
        for step in range(1, 4):
            for j, state in enumerate(states):
                arriving = store.load(j, [OwnedState(owner, state)])
                assert arriving is not None
                store.wait(arriving)
                state.keys = torch.cat([state.keys, torch.full((1, 4), float(10 * step + j), device=device)])
                state.lists[0] = state.lists[0] * 2
                store.store(j, [OwnedState(owner, state)])
        waits = [event for event in gpu.log if event.kind == "wait" and event.what.startswith("d2h")]
        store.settle()
        for j, state in enumerate(copy.deepcopy(states)):  # as a completion begins
            assert state.keys[:, 0].tolist() == [0.0, *(10.0 * step + j for step in range(1, 4))]
            assert state.lists[0].tolist() == [8.0, 8.0]
        store.close()
        assert not waits
        assert not gpu.faults


def test_a_share_on_disk_is_refused() -> None:
    check_cache_shares((0.5, 0.5, 0.0))
    with pytest.raises(PolicyError, match=r"single rows.*20% of the cache.*Give"):
        check_cache_shares((0.5, 0.3, 0.2))
