"""The comparison of slabs of several codings: what it runs, what it prints, and that different answers are an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.larger_than_ram import codings
from flexgen_helm.runs.larger_than_ram.contenders import Ours, Work
from flexgen_helm.runs.memory_limit.cgroup import Ended
from flexgen_helm.runs.memory_limit.engine_side import Answers, Sweep
from flexgen_helm.runs.memory_limit.process import Limits, Measured

WORK = Work("2 random tokens", [[1, 2], [3, 4]], 2)
LIMITS = Limits(None, 1, (Path("model"),))


def ours(seconds: float, processor_s: float, on_disk: int, tokens: list[list[int]]) -> Ours:
    sweeps = [Sweep(1.0, 4, 0, 10**9, None), Sweep(seconds - 1, 0, 2, 10**9, None)]
    answers = Answers(
        load_s=1.0,
        seconds=seconds,
        tokens=tokens,
        gaps=[],
        weight_bytes={"device": 0, "host": 0, "disk": on_disk},
        stats={"sweeps": 2},
        bits_per_weight=16.0,
        processor_s=processor_s,
        sweeps=sweeps,
    )
    return Ours(Measured(Ended(0, 1.0), 2e9, 2e9, ""), answers)


def engine(found: dict[str, Ours], asked: list[dict[str, Any]]) -> Callable[..., Ours]:
    def run_engine(work: Work, model: Path, arguments: dict[str, Any], limits: Limits, scratch: Path) -> Ours:
        asked.append(arguments)
        assert limits.folders == (Path("model"), Path(arguments["offload_folder"]))
        return found[arguments["policy"]["slab_coding"]]

    return run_engine


def compared(monkeypatch: pytest.MonkeyPatch, found: dict[str, Ours]) -> tuple[dict[str, Ours], list[dict[str, Any]]]:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(codings, "run_engine", engine(found, asked))
    arguments = {"policy": {"prefetch": 2}, "offload_folder": "slabs"}
    return codings.run_codings(WORK, Path("model"), arguments, LIMITS, Path(), codings=list(found)), asked


def test_each_coding_has_a_folder_and_its_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"plain": ours(4.0, 2.0, 3 * 2**30, [[5], [6]]), "lossless": ours(2.0, 3.0, 2 * 2**30, [[5], [6]])}
    found, asked = compared(monkeypatch, given)
    assert [(one["policy"], one["offload_folder"]) for one in asked] == [
        ({"prefetch": 2, "slab_coding": coding}, f"slabs-{coding}") for coding in given
    ]
    lines = codings.render(WORK, found)
    assert lines[-1].split(": ")[1] == ("2.00 times the requests/s, 1.50 times the processor time, 1.50 times fewer bytes")
    plain = codings.as_dict(found)
    assert (plain["plain"]["requests_per_second"], plain["lossless"]["requests_per_second"]) == (0.5, 1.0)
    assert plain["lossless"]["seconds_of_a_decoding_sweep"] == 1.0
    assert codings.render(WORK, {"lossless": found["lossless"]})[-1].startswith("  lossless")


def test_other_answers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"plain": ours(4.0, 2.0, 3, [[5], [6]]), "lossless": ours(2.0, 3.0, 2, [[5], [7]])}
    with pytest.raises(FlexGenError, match="slab_coding=lossless differ from those with plain"):
        compared(monkeypatch, given)
