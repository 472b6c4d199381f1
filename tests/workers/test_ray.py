"""Two Ray workers on this machine: what one that is killed leaves is taken over, and files are those of one worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")
pytest.importorskip("ray", reason="needs ray, which comes with the extra `ray`; make test-ray has it")

from flexgen_helm.helm.deployment import RUNNER
from flexgen_helm.runs.kill_test.__main__ import journal_keys
from flexgen_helm.runs.kill_test.files import read_suite
from flexgen_helm.runs.kill_test.suite import Command
from tests.models import save_tiny
from tests.tokenizers import save_character_tokenizer
from tests.workers import watched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 600)]
LONG = 600
"""Seconds after which something hangs."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("models"))
    save_character_tokenizer(folder)
    return folder


def heed_interrupts() -> None:
    """Shells let commands in the background ignore SIGINT, and so do their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def started(model: Path, output: Path, runner: str) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Starts the suite of the kill test with a runner, yields the suite's folder, and leaves no process behind."""
    command = Command(model, output, 4, disable_cache=True)
    command.write_files()
    arguments = command.arguments()
    arguments[arguments.index(RUNNER)] = runner
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parents[2])]))
    variables = {**os.environ, "PYTHONPATH": path, "FLEXGEN_HELM_WORKERS": "2", "OMP_NUM_THREADS": "1"}
    variables.pop("RAY_ADDRESS", None)
    with (output / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "helm.benchmark.run", *arguments],
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a signal to its group does not reach the test
            preexec_fn=heed_interrupts,
        )
    try:
        yield command.suite_folder, process
    finally:
        process.kill()  # Ray's processes end with it
        process.wait()


def run(model: Path, output: Path, runner: str, status: int = 0) -> Path:
    with started(model, output, runner) as (folder, process):
        assert process.wait(LONG) == status, (output / "log.txt").read_text()
    return folder


def computed(folder: Path) -> list[tuple[int, int, str]]:
    """Every answer that was computed: the worker, its process, the key."""
    lines = watched.computed_file(folder).read_text().splitlines()
    return [(int(worker), int(process), key) for worker, process, key in map(str.split, lines)]


def lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def assert_they_end(processes: Iterable[int]) -> None:
    """Ray ends them when the command ends, within seconds."""
    begun = time.monotonic()
    while any(map(lives, processes)):
        assert time.monotonic() - begun < LONG
        time.sleep(0.2)


def test_a_killed_worker_is_replaced_and_nothing_is_computed_twice(model: Path, tmp_path: Path) -> None:
    expected = read_suite(run(model, tmp_path / "one", RUNNER))
    folder = run(model, tmp_path / "two", "tests.workers.watched.KilledOnce")
    assert len(expected) == 4 * 5
    assert read_suite(folder) == expected
    answers, durable = computed(folder), set(watched.killed_file(folder).read_text().split())
    (killed, heir), others = (list(dict.fromkeys(p for worker, p, _ in answers if worker == n)) for n in (1, 2))
    assert len(others) == 1
    by_process = {process: {key for _, p, key in answers if p == process} for process in (killed, heir, *others)}
    assert by_process[killed] <= durable
    assert not by_process[heir] & durable
    assert not by_process[others[0]] & (by_process[killed] | by_process[heir])
    assert "Worker 1 of 2 was lost" in (tmp_path / "two" / "log.txt").read_text()
    assert not (folder / "flexgen_journal").exists()
    assert_they_end(by_process)


def test_a_worker_that_is_lost_again_and_again_ends_the_command_and_the_next_goes_on(model: Path, tmp_path: Path) -> None:
    folder = run(model, tmp_path, "tests.workers.watched.KilledAlways", status=1)
    assert "Worker 1 was lost 2 times" in (tmp_path / "log.txt").read_text()
    durable = set(journal_keys(folder))
    assert durable >= {key for _, _, key in computed(folder)}
    watched.computed_file(folder).unlink()
    run(model, tmp_path, "tests.workers.watched.Undisturbed")
    assert not {key for _, _, key in computed(folder)} & durable
    assert not (folder / "flexgen_journal").exists()


def test_an_interrupt_ends_all_workers_and_leaves_the_journals(model: Path, tmp_path: Path) -> None:
    with started(model, tmp_path, "tests.workers.watched.Waiting") as (folder, process):
        begun = time.monotonic()
        while not all((folder / f"waits-{number}").exists() for number in (1, 2)):
            assert time.monotonic() - begun < LONG, (tmp_path / "log.txt").read_text()
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(LONG) == 130
    answers = computed(folder)
    assert_they_end({worker for _, worker, _ in answers})
    assert set(journal_keys(folder)) == {key for _, _, key in answers}
