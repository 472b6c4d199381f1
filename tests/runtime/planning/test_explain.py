"""`plan --replay`: a run that is over, explained from its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm.cli import main
from flexgen_helm.run_stats import Forecast, RunStats
from flexgen_helm.runtime.planning.explain import read_run

GIB = 2**30
EXPECTED = Forecast(
    machine="t4",
    seconds=90.0,
    sweeps=40,
    peak_bytes={"device": 2 * GIB, "host": GIB, "disk": 0},
    bytes_moved={"disk_read": 160 * 10**9, "host_to_device": 100 * 10**9},
    busy_seconds={"disk_read": 80.0, "device": 30.0, "host_to_device": 10.0},
)
STATS = RunStats(
    num_jobs=4,
    seconds=100.0,
    sweeps=41,
    tier_peak_bytes={"device": GIB},
    bytes_moved={"disk_read": 160 * 10**9, "host_to_device": 150 * 10**9},
    busy_seconds={"disk_read": 100.0, "device": 31.0, "host_to_device": 15.0},
    predicted=EXPECTED,
)


def record(stats: RunStats | None = STATS) -> dict[str, Any]:
    """Returns what `flexgen.json` holds, as far as it is read."""
    measured = None if stats is None else {"date": "2026-11-29", "stats": stats.as_dict()}
    return {"deployment": "flexgen/a/b", "policy": {"prefetch": 2}, "measured": measured}


def written(folder: Path, found: Any) -> Path:
    file = folder / "flexgen.json"
    file.write_text(found if isinstance(found, str) else json.dumps(found))
    return file


def test_what_was_predicted_stands_beside_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """90 s predicted for 100 s; the disk read 1.6 GB/s and not 2; the link moved half as much again."""
    assert main(["plan", "--replay", str(written(tmp_path, record()))]) == 0
    text = capsys.readouterr().out
    for part in (
        "flexgen/a/b 2026-11-29",
        "predicted for t4: 90 s in 40 sweeps; measured: 100 s in 41 sweeps",
        "the prediction was 10.0% less than what was measured",
        "busy longest: predicted disk read, measured disk read",
        "most bytes on the device: 2.00 GiB predicted, 1.00 GiB measured",
        "most off: disk read, busy 20 s longer than predicted: it moved 1.60 GB/s, where 2.00 GB/s were predicted",
    ):
        assert part in text
    (row,) = [line for line in text.splitlines() if line.startswith("host to device")]
    assert row.split() == ["host", "to", "device", "10.00", "15.00", "93.13", "GiB", "139.70", "GiB"]


def test_the_explanation_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output of `bench --json` has the statistics at its top, and the policy in the engine's description."""
    bench = {"model": "m", "engine": {"policy": {"prefetch": 1}}, "stats": STATS.as_dict()}
    assert main(["plan", "--json", "--replay", str(written(tmp_path, bench))]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["error"] == pytest.approx(-0.1)
    assert (found["title"], found["policy"], found["predicted_binding"]) == ("m", {"prefetch": 1}, "disk_read")
    causes = {each["resource"]: each["cause"] for each in found["resources"]}
    assert causes["host_to_device"] == "it moved 50.0% more bytes"
    assert causes["device"] == ""


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("{", "cannot be read"),
        ({"runs": []}, "is not the record of a run"),
        ([], "is not the record of a run"),
        (record(None), "nothing was computed"),
        (record(RunStats(num_jobs=1, seconds=2.0)), "was not predicted"),
    ],
)
def test_what_cannot_be_explained_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], found: Any, message: str
) -> None:
    assert main(["plan", "--replay", str(written(tmp_path, found))]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_and_a_missing_model_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--replay", str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "Give --model M or --config FILE, or --replay FILE" in capsys.readouterr().err


def test_the_record_is_what_statistics_write(tmp_path: Path) -> None:
    assert read_run(written(tmp_path, record())).predicted == EXPECTED
