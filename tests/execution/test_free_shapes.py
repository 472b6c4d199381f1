"""Rows without padding: the same answers within level C, and no token computed for nothing."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen_helm import Engine
from flexgen_helm.execution.interfaces import Rows
from flexgen_helm.rows.choice import KindChoice
from flexgen_helm.schedule.rows import Row
from flexgen_helm.types import Policy
from tests.jobs import fixed_mix
from tests.reference import Agreement, Reference
from tests.workbench import Workbench

POLICY = Policy(gpu_batch_size=16, num_gpu_batches=2, gpu_batch_tokens=64)


@pytest.mark.parametrize("rows", ["packed", "single"])
def test_free_shapes_have_no_padding_and_equal_answers(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, rows: KindChoice
) -> None:
    folder, jobs, agreement = bench.folder("llama"), fixed_mix(3, 12), Agreement()
    with Engine.from_pretrained(
        str(folder), dtype="float32", device="cpu", policy=POLICY, rows=rows, free_shapes=True
    ) as engine:
        computing: Rows[Any] = engine._parts.executor._rows  # type: ignore[attr-defined]
        sizes: list[tuple[int, int]] = []
        record = computing.record

        def recorded(row: Row) -> object:
            sizes.append((row.size, row.num_tokens))
            return record(row)

        monkeypatch.setattr(computing, "record", recorded)
        results = engine.run(jobs)
    assert sizes
    assert all(size == tokens for size, tokens in sizes)
    assert len({size for size, _ in sizes}) > 2
    reference = Reference(folder)
    for job, result in zip(jobs, results, strict=True):
        agreement.add(job, result, reference)
    assert not agreement.failures, agreement.failures
