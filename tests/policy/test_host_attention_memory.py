"""The memory plan counts what the CPU's attention beside a device holds on the host."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_helm import Engine, Job
from flexgen_helm.memory.meter import Meter
from tests.jobs import random_tokens
from tests.workbench import OWN_MEMORY, POLICY, Workbench

ARENA = ("host", "attention")


def test_the_plan_counts_rows_to_which_the_cpu_attends(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    hold = Meter.hold

    def noted(meter: Meter, tier: str, arena: str, num_bytes: int) -> None:
        if (tier, arena) == ARENA:
            held.append(num_bytes)
        hold(meter, tier, arena, num_bytes)  # type: ignore[arg-type]

    monkeypatch.setattr(Meter, "hold", noted)
    policy = replace(POLICY, cpu_attention=1.0, cache=(0.0, 1.0, 0.0))
    jobs = [Job(token_ids=random_tokens(i, 9), max_new_tokens=4, ignore_eos=True) for i in range(2 * POLICY.gpu_batch_size)]
    with Engine.from_pretrained(
        str(bench.folder("llama")), dtype="float32", policy=policy, device=OWN_MEMORY, rows="packed"
    ) as engine:
        engine.run(jobs)
        plan = engine._parts.plan
    # Two rows of 16 queries: 4 heads of 16 for queries and outputs, 2 for K and V, all in fp32; queries and sums once more,
    # and two numbers for each head.
    row = 4 * 16 * (2 * 4 * 16 + 2 * 2 * 16 + 4 * (2 * 16 + 2))
    assert max(held) in (row, 2 * row)  # the first row may be done before the second one begins
    assert held[-1] == 0
    # Powers of two already; sums are counted with the size of the queries once more, which is more than two numbers a head.
    planned = 2 * 4 * 16 * (2 * 4 * 16 + 2 * 2 * 16 + 4 * 3 * 16)
    assert plan.cache.attention_bytes == planned >= 2 * row
    assert plan.cache.buffer_bytes["host"] >= planned
    without = replace(plan.cache, attention_bytes=0)
    assert plan.cache.least_bytes["host"] - without.least_bytes["host"] == planned
