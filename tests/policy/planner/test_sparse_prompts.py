"""Sparse attention of prompts: the pairs of queries and keys that are counted, and the rates that they take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from flexgen_helm import Engine, Job
from flexgen_helm.attention import sparse
from flexgen_helm.attention.calls import ChunkCall
from flexgen_helm.attention.chunks import score_call
from flexgen_helm.kv_cache.pages import CHUNK_TOKENS
from flexgen_helm.machine.profile import AttentionRate, MachineProfile, Rate
from flexgen_helm.policy.planner.durations import SPARSE_PROMPTS, Durations
from flexgen_helm.policy.planner.loads import RowLoad
from flexgen_helm.policy.planner.sweeps import sweep_loads
from flexgen_helm.policy.planner.workload import PlannedPrompt, Workload
from flexgen_helm.types import ResolvedPolicy
from tests.jobs import random_tokens
from tests.models import save_tiny
from tests.policy.planner.made import machine_with, plan_with, policy_with, shapes_with

SHARED = random_tokens(7, 150)
EARLIER, OWN = 4096, 512


def test_the_pairs_that_are_counted_are_those_that_the_engine_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several chunks, some behind a shared one, some only scored."""
    scored = 0

    def counted(call: ChunkCall, q: Tensor, pages: list[object], **options: object) -> Tensor:
        nonlocal scored
        scores: Tensor = score_call(call, q, pages, **options)  # type: ignore[arg-type]
        scored += scores.shape[0] * scores.shape[2]
        return scores

    monkeypatch.setattr(sparse, "score_call", counted)
    tokens = [[*(SHARED if i % 2 else ()), *random_tokens(50 + i, 100 + 60 * i)] for i in range(4)]
    jobs = [Job(token_ids=each, max_new_tokens=1 if i else 0, score_prompt=not i) for i, each in enumerate(tokens)]
    workload = Workload(tuple(PlannedPrompt(tuple(each), (1,) if i else (), not i) for i, each in enumerate(tokens)))
    policy = ResolvedPolicy(gpu_batch_size=16, gpu_batch_tokens=64, block_tokens=128, cpu_attention=0.0)
    folder = str(save_tiny("llama", tmp_path))
    with Engine.from_pretrained(folder, policy=policy, compression="kv4s10", device="cpu", rows="packed") as engine:
        plan, scored = engine._parts.plan, 0
        engine.run(jobs)
    rows = [row for load in sweep_loads(plan, workload) for row in load.rows if row.kind == "prefill"]
    assert scored == plan.shapes.num_layers * sum(row.earlier_keys for row in rows) > 0


def seconds(form: str, *formats: tuple[str, float], kind: str = "prefill") -> float:
    """Returns the time of attention to earlier keys, on a machine that knows some formats."""
    sparsity = 10 if "s" in form else None
    shapes = shapes_with(1, kv_format=form.split("s")[0], sparsity=sparsity)
    rates = tuple(AttentionRate("device", kind, name, Rate(rate)) for name, rate in formats)  # type: ignore[arg-type]
    durations = Durations(plan_with(shapes, policy_with()), machine(rates))
    row = RowLoad(kind, 32, 0, EARLIER)  # type: ignore[arg-type]
    return sum(stage.seconds for stage in durations.layer(0, row)) - sum(
        stage.seconds for stage in durations.layer(0, replace(row, earlier_keys=0))
    )


def machine(rates: tuple[AttentionRate, ...]) -> MachineProfile:
    return machine_with(own_memory=False, attention=rates)


ALL = (("bfloat16", 8e8), ("kv4", 7e8), ("bfloat16s10", 2e8), ("kv4s10", 1e8))
OPERATIONS = 4 * EARLIER * 4 * 8
"""Of 4 heads of 8 elements (`shapes_with`)."""


@pytest.mark.parametrize(("form", "rate"), ALL)
def test_keys_of_earlier_chunks_take_the_rate_of_their_format(form: str, rate: float) -> None:
    assert seconds(form, *ALL) == pytest.approx(OPERATIONS / rate)


@pytest.mark.parametrize(
    ("form", "formats", "rate"),
    [
        ("kv4s20", ALL, 1e8),  # another share of the same bits
        ("kv2s10", ALL, 1e8),  # other bits: the slowest that is sparse
        ("kv2", ALL, 7e8),  # the slowest that is not
        ("bfloat16s10", ALL[:2], 8e8 / SPARSE_PROMPTS),
        ("kv4s10", ALL[:1], 8e8 / SPARSE_PROMPTS),
    ],
)
def test_formats_that_were_not_measured(form: str, formats: tuple[tuple[str, float], ...], rate: float) -> None:
    assert seconds(form, *formats) == pytest.approx(OPERATIONS / rate)


def test_decode_rows_of_an_unknown_sparse_format_are_those_of_its_bits() -> None:
    """Measured: they take .6 to .75 of the time of dense ones, which reads the same bytes of K."""
    dense, found = (seconds(form, *ALL[:2], kind="decode") for form in ("kv4", "kv4s10"))
    assert found == dense


def test_a_querys_own_chunk_is_read_in_full() -> None:
    shapes = shapes_with(1, kv_format="bfloat16", sparsity=10, page_shares={"exact": 1.0, "sealed": 1.0})
    rates = tuple(AttentionRate("device", "prefill", name, Rate(rate)) for name, rate in ALL)
    durations = Durations(plan_with(shapes, policy_with()), machine(rates))
    with_own, without = (durations.layer(0, RowLoad("prefill", 32, own, 0))[0].seconds for own in (OWN * CHUNK_TOKENS, 0))
    assert with_own - without == pytest.approx(4 * OWN * CHUNK_TOKENS * 4 * 8 / 8e8)
