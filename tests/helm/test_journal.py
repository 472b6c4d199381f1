"""Answers that survive: the journal, alone."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm.errors import DiskFull, FlexGenError
from flexgen_helm.helm.journal import Journal
from flexgen_helm.helm.requests import Response, StoredCompletion

RUNS = ["one", "two"]
FIELDS = {"gpu_batch_size": 64, "cpu_attention": 1.0}


def response(number: int) -> Response:
    """Returns an answer with a number in it, long enough to be torn."""
    text = f"answer {number} \udc80 é \n" * 20
    completion = StoredCompletion(text=text, tokens=[("é", -1 / 3)], top_logprobs=[[(number, -0.1)]], finish_reason="stop")
    return Response(
        completions=[completion],
        request_time=0.1,
        request_datetime=1,
        batch_size=2,
        batch_request_time=0.2,
    )


def same(found: Response | None, expected: Response) -> bool:
    """Whether an answer is what was written; JSON knows no tuples."""
    assert found is not None
    (ours,), (theirs,) = found["completions"], expected["completions"]
    return [tuple(token) for token in ours["tokens"]] == theirs["tokens"] and ours["text"] == theirs["text"]


def test_answers_are_there_for_the_next_process(tmp_path: Path) -> None:
    with Journal(tmp_path, RUNS) as journal:
        for number in range(3):
            journal.append(f"key {number}", response(number))
        journal.note_policy("flexgen/a/b", FIELDS)
    with Journal(tmp_path, reversed(RUNS)) as journal:
        assert all(same(journal.lookup(f"key {number}"), response(number)) for number in range(3))
        assert journal.lookup("key 3") is None
        assert journal.policy("flexgen/a/b") == FIELDS
        assert journal.policy("flexgen/a/c") == {}
    # Fields of a policy are this command's, answers are anybody's.
    with Journal(tmp_path, ["another"]) as journal:
        assert same(journal.lookup("key 0"), response(0))
        assert journal.policy("flexgen/a/b") == {}


@pytest.mark.parametrize("field", ["completions", "batch_request_time", "request_datetime"])
def test_an_answer_of_another_form_is_computed_again(field: str, tmp_path: Path) -> None:
    other: Any = {name: value for name, value in response(0).items() if name != field}
    with Journal(tmp_path, RUNS) as journal:
        journal.append("key", other)
        journal.note_policy("flexgen/a/b", {"gpu_batch_size": "64"})  # type: ignore[dict-item]
    with Journal(tmp_path, RUNS) as journal:
        assert journal.lookup("key") is None
        assert journal.policy("flexgen/a/b") == {}
        journal.append("key", response(0))
        assert same(journal.lookup("key"), response(0))


def test_another_commands_journal_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").mkdir()
    with pytest.raises(FlexGenError, match=r"cannot be read or written: .*Is a directory: .*other\.jsonl"):
        Journal(tmp_path, RUNS)
    (tmp_path / "other.jsonl").rmdir()
    with Journal(tmp_path, RUNS) as journal:  # which the one that was refused does not keep locked
        journal.discard()


@pytest.mark.parametrize("runs", [None, "one", 3, [{}], [["one"]], {"one": 1}])
def test_a_journal_of_another_form_is_left_alone(runs: Any, tmp_path: Path) -> None:
    with Journal(tmp_path, ["other"]) as other:
        other._write({"runs": runs})
        (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes().splitlines(True)[-1])
    with Journal(tmp_path, RUNS) as journal:
        journal.discard()
    assert path.exists()


def test_a_record_torn_anywhere_costs_only_itself(tmp_path: Path) -> None:
    with Journal(tmp_path, RUNS) as journal:
        for number in range(3):
            journal.append(f"key {number}", response(number))
    (path,) = tmp_path.glob("*.jsonl")
    whole = path.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for length in (last + 1, last + 8, last + 9, last + 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with Journal(tmp_path, RUNS) as journal:
            assert same(journal.lookup("key 1"), response(1))
            assert journal.lookup("key 2") is None
            journal.append("key 3", response(3))
        with Journal(tmp_path, RUNS) as journal:
            assert same(journal.lookup("key 1"), response(1))
            assert same(journal.lookup("key 3"), response(3))


def test_a_damaged_record_is_not_served(tmp_path: Path) -> None:
    with Journal(tmp_path, RUNS) as journal:
        journal.append("key 0", response(0))
        journal.append("key 1", response(1))
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes().replace(b"answer 0", b"answer 7", 1))
    with Journal(tmp_path, RUNS) as journal:
        assert journal.lookup("key 0") is None
        assert same(journal.lookup("key 1"), response(1))


def test_a_journal_that_has_lost_its_first_record_is_not_thrown_away_by_others(tmp_path: Path) -> None:
    with Journal(tmp_path, RUNS) as journal:
        journal.append("key 0", response(0))
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(b"torn" + path.read_bytes())
    with Journal(tmp_path, ["other"]) as journal:
        journal.discard()
    assert list(tmp_path.glob("*.jsonl")) == [path]
    with Journal(tmp_path, RUNS) as journal:
        assert same(journal.lookup("key 0"), response(0))
    with Journal(tmp_path, [*RUNS, "three"]) as journal:
        journal.discard()
    assert list(tmp_path.glob("*.jsonl")) == []


def test_runs_of_other_commands_are_read_and_left(tmp_path: Path) -> None:
    with Journal(tmp_path, ["one", "two", "three"]) as larger:
        larger.append("key 0", response(0))
    with Journal(tmp_path, ["one"]) as smaller:
        smaller.append("key 1", response(1))
    with Journal(tmp_path, RUNS) as journal:
        assert same(journal.lookup("key 0"), response(0))
        assert same(journal.lookup("key 1"), response(1))
        journal.discard()
    # `one` is complete with what this command has run, `three` is not.
    (left,) = tmp_path.glob("*.jsonl")
    assert b"three" in left.read_bytes()


def test_two_processes_do_not_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path, RUNS), pytest.raises(FlexGenError, match=r"Another helm-run .* use another --suite"):
        Journal(tmp_path, RUNS)
    with Journal(tmp_path, ["one"]), Journal(tmp_path, RUNS) as journal:
        journal.discard()
        # Of a living process.
        assert len(list(tmp_path.glob("*.jsonl"))) == 1


def test_kill_keeps_what_was_appended(tmp_path: Path) -> None:
    def append_and_die() -> None:
        journal = Journal(tmp_path, RUNS)
        for number in range(5):
            journal.append(f"key {number}", response(number))
        os.kill(os.getpid(), signal.SIGKILL)

    context = multiprocessing.get_context("fork")
    process = context.Process(target=append_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with Journal(tmp_path, RUNS) as journal:
        assert all(same(journal.lookup(f"key {number}"), response(number)) for number in range(5))


class Clock:
    """Time that passes when it is told to, and how often files were synchronised."""

    def __init__(self) -> None:
        self.now = 100.0
        self.syncs: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def fsync(self, descriptor: int) -> None:
        self.syncs.append(self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr("flexgen_helm.helm.journal.time", fake)
    monkeypatch.setattr("flexgen_helm.helm.journal.os.fsync", fake.fsync)
    return fake


@pytest.mark.parametrize("pause", [0.01, 0.3, 0.7, 1.5, 60.0])
def test_records_are_synchronised_at_most_once_a_second_and_at_the_end(pause: float, clock: Clock, tmp_path: Path) -> None:
    with Journal(tmp_path, RUNS) as journal:
        clock.syncs.clear()
        for number in range(100):
            clock.now += pause
            journal.append(f"key {number}", response(number))
        appended, during = clock.now, list(clock.syncs)
    assert all(after - before >= 1 for before, after in itertools.pairwise([100.0, *during]))
    # None waits for longer than a second and a pause while others come, and none is left when the command ends.
    assert all(after - before <= 1 + 2 * pause for before, after in itertools.pairwise([100.0, *during, appended]))
    assert clock.syncs[-1] == appended


def test_what_needs_no_synchronising_gets_none(clock: Clock, tmp_path: Path) -> None:
    with Journal(tmp_path, RUNS) as journal:
        journal.append("key", response(0))
    clock.syncs.clear()
    with Journal(tmp_path, RUNS) as journal:
        clock.now += 10
        journal.append("key", response(0))  # is there already
    with Journal(tmp_path, RUNS) as journal:
        journal.append("other key", response(1))
        journal.discard()
    assert clock.syncs == []


def test_a_disk_that_fails_to_synchronise_is_one_clear_error(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("flexgen_helm.helm.journal.os.fsync", fail)
    journal = Journal(tmp_path, RUNS)
    journal.append("key", response(0))
    with pytest.raises(FlexGenError, match=r"cannot be read or written: .*Input/output error"), journal:
        pass


def test_full_disk_is_one_clear_error_and_keeps_the_rest(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(tmp_path, RUNS) as journal:
        journal.append("key 0", response(0))
        (path,) = tmp_path.glob("*.jsonl")
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, limits[1]))
        try:
            with pytest.raises(DiskFull, match=r"Free some space\. Finished answers are kept; run the same command again"):
                journal.append("key 1", response(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with Journal(tmp_path, RUNS) as journal:
        assert same(journal.lookup("key 0"), response(0))
        assert journal.lookup("key 1") is None
        journal.append("key 1", response(1))
        assert same(Journal(tmp_path, ["other"]).lookup("key 1"), response(1))


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FlexGenError, match="cannot be read or written"):
        Journal(tmp_path / "file", RUNS)
