"""Kill a small suite at random moments and compare what becomes of it: ``python -m flexgen_helm.runs.kill_test``."""

from __future__ import annotations

import math
import random
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.runs.command_line import add_model, make_parser, reports_errors
from flexgen_helm.runs.kill_test.files import read_suite
from flexgen_helm.runs.kill_test.suite import Command

MOST_NEW_ANSWERS = 8
"""A kill that waits for answers waits for at most so many."""


@dataclass
class Tally:
    """Counts of what happened to the killed commands."""

    kills: int = 0
    during: dict[str, int] = field(default_factory=dict)
    """Kills by what the command had reached."""
    completed: int = 0
    """Suites that reached their end and whose files were compared."""
    most_resumed: int = 0
    """Most answers in the journal when a command was started."""


@reports_errors
def main() -> int:
    """Run the command and return its exit status: 0 where nothing was lost, computed twice or different."""
    parser = make_parser("kill_test", __doc__)
    parser.add_argument("--kills", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments")
    add_model(parser)
    parser.add_argument("-m", "--max-eval-instances", type=int, default=8, metavar="N", help="instances of each entry")
    parser.add_argument("--disable-cache", action="store_true", help="as of helm-run: the journal alone")
    parser.add_argument("--variant", metavar="V", help="compressed variant, as behind an @")
    parser.add_argument("--cache-on-disk", action="store_true", help="K and V are on disk")
    arguments = parser.parse_args()
    engine: dict[str, Any] = {"compression": arguments.variant} if arguments.variant else {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.cache_on_disk:
            engine |= {"policy": {"cache": [0, 0, 1]}, "offload_folder": str(Path(folder) / "pages")}
        model = arguments.model or smollm2_folder()
        command = Command(model, Path(folder), arguments.max_eval_instances, arguments.disable_cache, engine)
        tally = kill(command, arguments.kills, arguments.seed)
    print(f"{tally.kills} kills, {tally.completed} suites completed, all equal to the undisturbed one.")
    print(f"Killed when the command had reached: {tally.during}. Most answers resumed: {tally.most_resumed}.")
    return 0


def kill(command: Command, kills: int, seed: int, expected: dict[str, Any] | None = None) -> Tally:
    """Kill a suite until ``kills`` kills have met a living process.

    Args:
        command: The suite, with the folder for all outputs.
        kills: Number of kills.
        seed: Seed of the moments: half of them uniform over the time of an undisturbed command, half when answers arrive.
        expected: Files of an undisturbed suite, see `read_suite`; None: one is run.

    Raises:
        AssertionError: An answer was lost or computed twice, or files differ from the undisturbed suite's.
    """
    disturbed = replace(command, output_path=command.output_path / "disturbed")
    if expected is None:
        undisturbed = replace(command, output_path=command.output_path / "undisturbed")
        _run_to_the_end(undisturbed)
        expected = read_suite(undisturbed.suite_folder)
    tally, moments = Tally(), random.Random(seed)
    # Timed once the slow imports are done.
    seconds = _run_to_the_end(disturbed)
    _compare(disturbed, expected, tally)
    durable: list[str] = []
    bar = tqdm(total=kills, desc="Kills", disable=None)
    for _ in range(20 + 5 * kills):
        if tally.kills == kills:
            break
        # Loading takes longer than answering: every other kill waits for a number of new answers, not for a time.
        at = moments.uniform(0, seconds) if tally.kills % 2 else math.inf
        durable = _kill_once(disturbed, expected, durable, (at, moments.randint(1, MOST_NEW_ANSWERS)), tally)
        bar.update(tally.kills - bar.n)
    bar.close()
    assert tally.kills == kills, "the suite ends before it can be killed: ask for more instances"
    _run_to_the_end(disturbed)
    _compare(disturbed, expected, tally)
    return tally


def _kill_once(
    command: Command, expected: dict[str, object], durable: list[str], moment: tuple[float, int], tally: Tally
) -> list[str]:
    """Start a suite, kill it and see what it left; returns the answers that are durable now.

    Args:
        command: The suite.
        expected: Files of the undisturbed suite.
        durable: Answers that earlier commands left.
        moment: Seconds and number of new answers, of which the first that is reached is the moment of the kill.
        tally: Is told what happened.
    """
    process = command.start()
    _wait(process, command, moment[0], len(durable) + moment[1])
    process.kill()
    process.join()
    tally.kills += process.exitcode != 0
    now = journal_keys(command.suite_folder)
    finished = process.exitcode == 0 or (_complete(command, expected) and not now)
    computed = set(command.computed.read_text().split()) if command.computed.exists() else set()
    assert not computed & set(durable), "an answer was computed again after it was durable"
    if not finished:
        assert now[: len(durable)] == durable, "a finished answer is lost"
        assert len(computed - set(now)) <= 1, "answers were not durable when they were finished"
        assert process.exitcode == -9, f"the command failed; see {command.log}"
    stage = _stage(durable, now, finished)
    tally.during[stage] = tally.during.get(stage, 0) + 1
    tally.most_resumed = max(tally.most_resumed, len(durable))
    if finished:
        _compare(command, expected, tally)
    return [] if finished else now


def _wait(process: BaseProcess, command: Command, seconds: float, answers: int) -> None:
    """Wait until a time has passed; where that is infinite, until the journal has so many answers or the process ends."""
    if seconds < math.inf:
        process.join(seconds)
    while process.is_alive() and seconds == math.inf and len(journal_keys(command.suite_folder)) < answers:
        time.sleep(0.001)


def journal_keys(suite_folder: Path) -> list[str]:
    """Return the key of every whole record in the journal of a suite, in order."""
    lines = []
    for path in suite_folder.glob("flexgen_journal/*.jsonl"):
        with suppress(FileNotFoundError):  # the command has ended between the two
            lines += path.read_bytes().splitlines(True)
    keys = [line.split(b'"key": "', 1)[1][:64] for line in lines if b'"key": "' in line and line.endswith(b"}\n")]
    return [key.decode() for key in keys]


def _stage(before: list[str], now: list[str], finished: bool) -> str:
    if finished:
        return "the end"
    return "new answers" if len(now) > len(before) else "no new answer"


def _complete(command: Command, expected: dict[str, object]) -> bool:
    return set(read_suite(command.suite_folder)) == set(expected)


def _run_to_the_end(command: Command) -> float:
    started = time.monotonic()
    process = command.start()
    process.join()
    assert process.exitcode == 0, f"the command failed; see {command.log}"
    return time.monotonic() - started


def _compare(command: Command, expected: dict[str, object], tally: Tally) -> None:
    actual = read_suite(command.suite_folder)
    differing = [name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)]
    assert not differing, f"these files differ from the undisturbed suite's: {differing}"
    tally.completed += 1
    shutil.rmtree(command.output_path)


if __name__ == "__main__":
    sys.exit(main())
