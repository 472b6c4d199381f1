"""Memory that does not suffice in a sweep: rows are halved, what was begun is repeated, nothing is lost."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flexgen_helm import Engine
from flexgen_helm.errors import OutOfSpace
from flexgen_helm.rows.packed import PackedRows
from flexgen_helm.rows.single import SingleRows
from flexgen_helm.runtime.intake import answer
from tests.jobs import fixed_mix
from tests.reference import Agreement
from tests.workbench import POLICY, Workbench

JOBS = fixed_mix(5, 16)


CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
"""What torch raises where a GPU's memory ends outside of its allocator."""


def on_a_small_device(
    own: Callable[..., Any], most: int, size: Callable[..., int], error: Exception | None = None
) -> Callable[..., Any]:
    """A method as it is on a device whose memory suffices for so many tokens."""

    def method(self: Any, *arguments: Any) -> Any:
        if size(*arguments) > most:
            raise error or torch.OutOfMemoryError(f"no memory for {size(*arguments)} tokens")
        return own(self, *arguments)

    return method


def noting(size: Callable[..., int], seen: list[int]) -> Callable[..., int]:
    """A measure of size that notes what it found."""

    def measure(*arguments: Any) -> int:
        seen.append(size(*arguments))
        return seen[-1]

    return measure


def noting_argument(own: Callable[..., Any], size: Callable[..., int], seen: list[int]) -> Callable[..., Any]:
    """A method that notes the size of its argument."""

    def method(self: Any, argument: Any) -> Any:
        seen.append(size(argument))
        return own(self, argument)

    return method


def in_second_layer(j: int, recording: Any) -> int:
    return int(recording.hidden.shape[1]) if j == 1 else 0


@pytest.mark.parametrize(("method", "size"), [("replay", in_second_layer), ("finish", len)])
def test_rows_are_halved_and_answers_stay(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str, size: Callable[..., int]
) -> None:
    most = POLICY.gpu_batch_tokens // 2 if method == "replay" else POLICY.gpu_batch_size
    policy = POLICY if method == "replay" else POLICY.__class__(gpu_batch_size=32, gpu_batch_tokens=32, block_tokens=4096)
    with Engine.from_pretrained(str(bench.folder("llama")), device="cpu", policy=policy) as engine:
        monkeypatch.setattr(PackedRows, method, on_a_small_device(getattr(PackedRows, method), most, size))
        with caplog.at_level(logging.WARNING):
            results = engine.run(JOBS)
        warnings = [record.getMessage() for record in caplog.records]
        assert len(warnings) == 1
        assert re.search("no memory for 32 tokens.*Continuing with 16", warnings[0])
        seen: list[int] = []
        monkeypatch.setattr(PackedRows, method, on_a_small_device(getattr(PackedRows, method), most, noting(size, seen)))
        assert engine.run(JOBS) == results
        assert len(caplog.records) == 1  # smaller rows stay
        assert max(seen) == most  # and are no smaller than they must be
    agreement = Agreement()
    for job, result in zip(JOBS, results, strict=True):
        agreement.add(job, result, bench.reference("llama"))
    assert agreement.tokens > 30
    assert not agreement.failures, agreement.failures


def test_answers_are_never_given_twice(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that ends behind the first slice of the output head."""
    with Engine.from_pretrained(str(bench.folder("llama")), device="cpu", policy=POLICY) as engine:
        expected, slices = engine.run(JOBS), iter(range(99))

        def give(logit_requests: Any, logits: Any) -> None:
            if next(slices) == 2:
                raise torch.OutOfMemoryError("no memory for log-probabilities")
            answer(logit_requests, logits)

        with monkeypatch.context() as patch:
            patch.setattr("flexgen_helm.runtime.worker.answer", give)
            assert engine.run(JOBS) == expected  # begun anew, in halves
        assert next(slices) > 3
        assert engine.run(JOBS) == expected


@pytest.mark.parametrize(
    ("rows", "kind", "method", "size"),
    [
        ("packed", PackedRows, "replay", lambda j, _: j),
        ("packed", PackedRows, "finish", len),
        ("single", SingleRows, "replay", lambda j, _: j),
    ],
)
def test_what_does_not_fit_at_all_is_an_error_and_the_next_run_has_whole_rows(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, rows: Any, kind: type[Any], method: str, size: Callable[..., int]
) -> None:
    policy, sizes = replace(POLICY, gpu_batch_size=32), list[int]()
    with Engine.from_pretrained(str(bench.folder("llama")), device="cpu", policy=policy, rows=rows) as engine:
        expected, own = engine.run(JOBS), getattr(kind, method)
        with monkeypatch.context() as patch:
            patch.setattr(kind, method, on_a_small_device(own, 0, size))
            with pytest.raises(OutOfSpace, match="Lower gpu_batch_tokens"):
                engine.run(JOBS)
        monkeypatch.setattr(kind, "record", noting_argument(kind.record, lambda row: row.size, sizes))
        monkeypatch.setattr(kind, "finish", noting_argument(kind.finish, len, sizes))
        assert engine.run(JOBS) == expected
        assert rows == "single" or set(sizes) == {32}


@pytest.mark.parametrize("method", ["replay", "finish"])
def test_memory_that_ends_in_a_library_halves_rows_too(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    size = in_second_layer if method == "replay" else len
    policy = replace(POLICY, gpu_batch_size=32)
    with Engine.from_pretrained(str(bench.folder("llama")), device="cpu", policy=policy) as engine:
        monkeypatch.setattr(PackedRows, method, on_a_small_device(getattr(PackedRows, method), 16, size, CUBLAS))
        with caplog.at_level(logging.WARNING):
            assert len(engine.run(JOBS)) == len(JOBS)
    assert [record.getMessage().partition(" (CUDA")[0] for record in caplog.records] == [
        f"{'A row of' if method == 'replay' else 'The output head on'} 32 tokens does not fit into the device's memory"
    ]
