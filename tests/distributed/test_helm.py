"""`torchrun ... -m flexgen_helm eval`: a stage is killed half-way, and the same command goes on behind the answers given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from flexgen_helm.runs.kill_test.__main__ import journal_keys
from flexgen_helm.runs.kill_test.files import read_suite
from tests.models import save_tiny
from tests.tokenizers import save_character_tokenizer

SUITE = """entries: [
  {description: "synthetic_reasoning:mode=pattern_match,model=text", priority: 1}
  {description: "dyck_language:num_parenthesis_pairs=3,model=text", priority: 1}
]"""
"""Entries whose data HELM makes up itself."""
POLICY = "gpu_batch_size=16,gpu_batch_tokens=32,num_gpu_batches=1,block_tokens=256"
"""Small blocks, so that answers come one after the other."""
LAUNCHER = ("torch.distributed.run", "--nproc-per-node", "2", "-m")
LEAST_ANSWERS = 6
"""Answers, of 48, behind which the stage is killed."""
MOST_SECONDS = 30
"""In which a run must end that has lost a stage."""


def command(model: Path, output: Path, *, launcher: tuple[str, ...] = ()) -> list[str]:
    suite = model.parent / "made_up"
    options = ("--model", model, "--suite", suite, "--out", output, "-m", 24, "--policy", POLICY)
    return [sys.executable, "-m", *launcher, "flexgen_helm", "eval", *map(str, options)]


def run(model: Path, output: Path, *, launcher: tuple[str, ...] = ()) -> None:
    done = subprocess.run(command(model, output, launcher=launcher), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def stage_of(launcher: int, rank: int) -> int:
    """Returns the process that a launcher has started for a stage."""
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or f"\nPPid:\t{launcher}\n" not in (folder / "status").read_text():
                continue
            if f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:  # has ended meanwhile
            continue
    raise AssertionError(f"no process has rank {rank}")


def kill_second_stage(model: Path, output: Path, log: Path) -> list[str]:
    """Starts the command and kills its second stage once there are answers; returns the keys of those that are durable."""
    with log.open("w") as file:
        launcher = subprocess.Popen(
            command(model, output, launcher=LAUNCHER), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while len(journal_keys(output / "runs" / "made_up")) < LEAST_ANSWERS:
            assert launcher.poll() is None, log.read_text()
            time.sleep(0.01)
        os.kill(stage_of(launcher.pid, 1), signal.SIGKILL)
        killed = time.monotonic()
        assert launcher.wait(timeout=120) != 0
        assert time.monotonic() - killed < MOST_SECONDS
    finally:
        launcher.kill()
        launcher.wait()
    keys: list[str] = journal_keys(output / "runs" / "made_up")
    return keys


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the stage by /proc")
def test_a_suite_goes_on_behind_the_answers_of_stages_of_which_one_was_killed(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path, num_layers=4)
    save_character_tokenizer(model)
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up" / "run_entries.conf").write_text(SUITE)
    one, divided, log = tmp_path / "one", tmp_path / "divided", tmp_path / "log"

    durable = kill_second_stage(model, divided, log)
    said = [line for line in log.read_text().splitlines() if line.startswith("flexgen-helm: ")]
    assert len(said) == 1, log.read_text()
    assert "The pipeline has lost stage 2 of 2 (rank 1 on " in said[0]
    assert "start the same command again" in said[0]

    run(model, divided, launcher=LAUNCHER)
    runs = sorted((divided / "runs" / "made_up").glob("*/flexgen.json"))
    requests = sum((Counter(json.loads(file.read_text())["requests"]) for file in runs), Counter[str]())
    # HELM's cache has some of those that the journal has, if the first process had the time to tell it.
    assert requests["resumed"] + requests["cached"] == len(durable) >= LEAST_ANSWERS
    assert requests["computed"] == requests["total"] - len(durable) > 0

    run(model, one)
    found, expected = read_suite(divided / "runs" / "made_up"), read_suite(one / "runs" / "made_up")
    assert len(expected) > 2
    assert found == expected
