"""The self-check refuses what is wrong by more than its tolerance, 1e-3 in log-probability, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgen_helm import Engine, Policy, UnsupportedModel
from flexgen_helm.errors import FlexGenError
from flexgen_helm.rows import self_check
from flexgen_helm.rows.choice import Kind
from flexgen_helm.rows.packed import PackedRows
from flexgen_helm.rows.single import SingleRows
from flexgen_helm.schedule.rows import Row
from tests.models import save_tiny

POLICY = Policy(gpu_batch_size=16, num_gpu_batches=1, gpu_batch_tokens=64)
ROWS: dict[Kind, Any] = {"packed": PackedRows, "single": SingleRows}
TOO_LARGE, SMALL = 3e-3, 5e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models"))


def worst_difference(folder: Path, rows: Kind) -> float:
    with Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY, rows=rows) as engine:
        return engine.self_check.worst_difference


def moved(logits: Tensor, by: float) -> Tensor:
    """Logits by which the log-probability of the least likely token, and hardly that of another, is larger by as much."""
    least = logits.argmin(-1, keepdim=True)
    return logits.scatter_add(-1, least, torch.full_like(logits, by))


def leak(monkeypatch: pytest.MonkeyPatch, rows: type[Any], change: Callable[[Tensor], Tensor]) -> None:
    """Change what rows answer."""
    whole = rows.finish
    monkeypatch.setattr(rows, "finish", lambda self, hidden: change(whole(self, hidden)))


@pytest.mark.parametrize("rows", ROWS)
def test_a_difference_above_the_tolerance_is_refused(rows: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leak(monkeypatch, ROWS[rows], lambda logits: moved(logits, TOO_LARGE))
    with pytest.raises(UnsupportedModel, match=r"by 0\.00(3|29\d*|30\d*) in log-probability"):
        worst_difference(folder, rows)


@pytest.mark.parametrize("rows", ROWS)
def test_a_difference_below_the_tolerance_is_loaded_and_told(rows: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leak(monkeypatch, ROWS[rows], lambda logits: moved(logits, SMALL))
    assert worst_difference(folder, rows) == pytest.approx(SMALL, rel=0.1)


@pytest.fixture
def far_neighbours(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each row that is recorded, whether one of its sequences is far from its beginning."""
    whole, found = PackedRows.record, list[bool]()

    def record(self: PackedRows, row: Row) -> Any:
        found.append(any(segment.start > 64 for segment in row.segments))
        return whole(self, row)

    monkeypatch.setattr(PackedRows, "record", record)
    return found  # type: ignore[return-value]


def test_a_leak_from_a_far_neighbour_alone_is_refused(
    folder: Path, far_neighbours: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    leak(monkeypatch, PackedRows, lambda logits: moved(logits, TOO_LARGE) if far_neighbours[-1] else logits)
    with pytest.raises(UnsupportedModel, match=r"a far position of another sequence .* by 0\.00(3|29\d*|30\d*)"):
        worst_difference(folder, "packed")


def with_nan(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., 0] = torch.nan
    return logits


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("side", ["ours", "transformers'", "both"])
def test_nan_on_either_side_is_refused(side: str, rows: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if side != "transformers'":
        leak(monkeypatch, ROWS[rows], with_nan)
    if side != "ours":
        plain = self_check.plain_logprobs
        monkeypatch.setattr(self_check, "plain_logprobs", lambda *arguments: [with_nan(found) for found in plain(*arguments)])
    with pytest.raises(FlexGenError):
        worst_difference(folder, rows)
