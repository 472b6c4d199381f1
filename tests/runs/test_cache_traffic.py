"""Bytes by variant: sums by hand, and a run of a tiny model with and without sparse attention."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flexgen_helm.run_stats import RunStats, SweepStats
from flexgen_helm.runs.cache_traffic import __main__ as command
from flexgen_helm.runs.cache_traffic.__main__ import Traffic, traffic
from tests.models import save_tiny
from tests.tokenizers import save_character_tokenizer


def test_weights_are_left_out_and_sweeps_that_only_decode_are_summed_apart() -> None:
    sweeps = [
        SweepStats(0, 1, 64, 3, 1, {"host_to_device": 1000, "device_to_host": 70}, {"host_to_device": 400}),
        SweepStats(1, 1, 0, 3, 3, {"host_to_device": 500, "device_to_host": 8}, {"host_to_device": 400}),
        SweepStats(2, 1, 0, 3, 3, {"host_to_device": 450}, {"host_to_device": 400}),
    ]
    found = traffic("s10", "host", RunStats(per_sweep=sweeps, bytes_saved={"host_to_device": 9}))
    moved, decoding = {"host_to_device": 750, "device_to_host": 78}, {"host_to_device": 150, "device_to_host": 8}
    assert found == Traffic("s10", "host", moved, decoding, {"host_to_device": 9})


def test_the_command_prints_what_each_variant_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    save_character_tokenizer(folder)
    monkeypatch.setattr(command, "recent_addresses", lambda: "Thank you all very much. " * 20)
    options = ["--tokens", "200", "--prompts", "2", "--new-tokens", "4", "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["cache_traffic", "--model", str(folder), *options, "--variants", "bf16", "s10"])
    assert command.main() == 0
    plain, sparse = (Traffic(**each) for each in json.loads((tmp_path / "x.json").read_text()))
    assert [(each.variant, each.cache) for each in (plain, sparse)] == [("bf16", "host"), ("s10", "host")]
    assert plain.saved == {}
    # Without compression a page has the same bytes under both, so what is not saved is what dense attention brings.
    [saved] = sparse.saved.values()
    assert 0 < saved == plain.moved["host_to_device"] - sparse.moved["host_to_device"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[1:]] == [[each.variant, link] for each in (plain, sparse) for link in each.moved]
    assert {line[-1] for line in lines[1:3]} == {"-"}
    assert lines[-1][-1] == f"{saved / 1e6:.2f}"
