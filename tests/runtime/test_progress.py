"""The bar and its estimate on simulated runs, whose true cost is known."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator

import pytest

from flexgen_helm.run_stats import RunStats
from flexgen_helm.runtime.progress import Progress, TimeLeft, summary
from flexgen_helm.runtime.worker import Snapshot

SECONDS_PER_PROMPT_TOKEN = 0.001
SECONDS_PER_STEP = 0.3
ROWS = 10
SINCE = Snapshot(sweeps=7, prompt_tokens=1000, generated_tokens=50)
"""The engine has run before."""


STATS = RunStats(
    num_jobs=1200,
    prompt_tokens_asked=60_000,
    prompt_tokens_computed=10_000,
    generated_tokens=2_000,
    sweeps=9,
    seconds=24.0,
    peak_bytes=3 * 2**29,
)


class Run:
    """A run of sweeps as the worker reports them: ``prompts`` and ``tokens`` are computed in each sweep."""

    def __init__(self, prompts: list[int], tokens: list[int], *, ended_early: list[int] | None = None) -> None:
        self.prompts, self.tokens = prompts, tokens
        self.retired = [new + early for new, early in zip(tokens, ended_early or [0] * len(tokens), strict=True)]
        self.seconds = [
            prompt * SECONDS_PER_PROMPT_TOKEN + (new > 0) * SECONDS_PER_STEP
            for prompt, new in zip(prompts, tokens, strict=True)
        ]
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def snapshots(self) -> Iterator[Snapshot]:
        prompt_tokens, generated = SINCE.prompt_tokens, SINCE.generated_tokens
        for sweep, seconds in enumerate(self.seconds):
            left = sum(self.prompts[sweep + 1 :]), sum(self.retired[sweep:])
            for row in range(ROWS + 1):  # The first report of a sweep comes when weights are loaded.
                self.now += seconds / ROWS if row else 0
                yield Snapshot(SINCE.sweeps + sweep, prompt_tokens, generated, *left, row / ROWS)
            prompt_tokens += self.prompts[sweep]
            generated += self.tokens[sweep]
            yield Snapshot(SINCE.sweeps + sweep + 1, prompt_tokens, generated, *left, 0.0)


@pytest.mark.parametrize(
    "run",
    [
        Run([400] * 8, [0] * 8),
        Run([0] * 20, [16] * 20),
        Run([1000, 1000, 500, 0, *[0] * 30], [0, 16, 32, 48, *[48] * 30]),
        Run([0, *[5, 60, 20, 90] * 5, 3000, 3000], [1, *[64] * 20, 0, 0]),
    ],
    ids=["scoring", "decoding", "prompts first", "prompts last"],
)
def test_time_left_comes_from_the_cost_of_each_kind(run: Run) -> None:
    estimate = TimeLeft(8, since=SINCE, clock=run.clock)
    total = sum(run.seconds)
    checked = 0
    for snapshot in run.snapshots():
        estimate.observe(snapshot)
        left = estimate.seconds()
        if snapshot.sweeps - SINCE.sweeps >= 4 and snapshot.sweep_share:
            # A sweep's own new tokens are still in the budget: an estimate may be late by one sweep.
            assert left == pytest.approx(total - run.now, abs=max(run.seconds) + 1e-6, rel=0.1)
            checked += 1
    assert checked > ROWS


@pytest.mark.parametrize("early", [True, False])
def test_completions_that_end_early_are_foreseen(early: bool) -> None:
    """80 requests of a budget of 50 tokens, 8 at a time, of which every one uses 10 (or all 50)."""
    used = 10 if early else 50
    run = Run([0] * 10 * used, [8] * 10 * used, ended_early=[8 * (50 - used) // used] * 10 * used)
    estimate = TimeLeft(80, since=SINCE, clock=run.clock)
    for snapshot in run.snapshots():
        estimate.observe(snapshot)
        sweep, share = snapshot.sweeps - SINCE.sweeps, snapshot.sweep_share
        if sweep == 5 * used:
            break
        if share == 1 and sweep % used == used - 1:
            for _ in range(8):
                estimate.ended(["stop" if early else "length"])
    assert estimate.seconds() == pytest.approx(sum(run.seconds) / 2, rel=0.05)


def test_the_last_completions_cost_as_much_as_a_full_row() -> None:
    """Of 16 sequences 15 end; the last one makes as many steps as its budget, at the price of a row each."""
    run = Run([0] * 60, [16] * 20 + [1] * 40)
    estimate = TimeLeft(16, since=SINCE, clock=run.clock)
    for snapshot in run.snapshots():
        estimate.observe(snapshot)
        if snapshot.sweeps - SINCE.sweeps == 30:
            break
    assert estimate.seconds() == pytest.approx(30 * SECONDS_PER_STEP, rel=0.05)


def test_first_sweep_knows_its_end_only_if_nothing_follows() -> None:
    single, several = Run([500], [0]), Run([500, 500], [0, 0])
    estimates = []
    for run in (single, several):
        estimate = TimeLeft(8, since=SINCE, clock=run.clock)
        for snapshot in run.snapshots():
            estimate.observe(snapshot)
            if snapshot.sweep_share == 0.4:
                break
        estimates.append(estimate.seconds())
    assert estimates[0] == pytest.approx(0.3)
    assert estimates[1] is None


def test_the_line_counts_this_run_only() -> None:
    run = Run([100, 100], [0, 10])
    progress = Progress(3, since=SINCE, shown=False, clock=run.clock)
    for snapshot in run.snapshots():
        progress.update(snapshot)
        if snapshot.sweeps == SINCE.sweeps + 1 and snapshot.sweep_share == 0.5:
            break
    progress.request_done()
    # 100 prompt tokens in 0.1 s, then half of a sweep of 0.4 s.
    assert progress.line().startswith("1/3 requests, sweep 2 (50%), 333 tokens/s, ")


def test_bar_moves_forward_within_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run([2000] * 6, [0] * 6)
    progress = Progress(6, since=SINCE, shown=True, clock=run.clock)
    for snapshot in run.snapshots():
        progress.update(snapshot)
    text = progress.finish(STATS)
    drawn = capsys.readouterr().err
    shares = [int(number) for number in re.findall(r"(\d+)%\|", drawn)]
    assert shares == sorted(shares)
    assert len(set(shares)) > 2 * len(run.prompts)
    assert max(shares) < 100
    assert drawn.splitlines()[-1].endswith(text)


@pytest.mark.parametrize("shown", [False, None])
def test_nothing_is_drawn_unless_asked_or_on_a_terminal(shown: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run([2000] * 3, [0] * 3)
    progress = Progress(6, since=SINCE, shown=shown, clock=run.clock)
    for snapshot in run.snapshots():
        progress.update(snapshot)
    assert progress.finish(STATS) == summary(STATS)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_without_a_terminal_a_line_comes_every_half_minute(
    stream: io.StringIO | None, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt token takes a millisecond in `Run`, so a sweep takes 20 s."""
    run = Run([20_000] * 6, [0] * 6)
    progress = Progress(6, since=SINCE, shown=stream, clock=run.clock)
    times, begin = [], run.clock()
    with caplog.at_level("INFO", logger="flexgen_helm.runtime.progress"):
        for snapshot in run.snapshots():
            before = len(caplog.messages)
            progress.update(snapshot)
            times += [run.clock() - begin] * (len(caplog.messages) - before)
    progress.finish(STATS)
    took = run.clock() - begin
    assert len(times) == pytest.approx(took / 30, abs=1)
    assert len(times) > 2
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert all(30 <= gap < 40 for gap in gaps)
    assert all(line.startswith("0/6 requests, sweep ") for line in caplog.messages)
    assert capsys.readouterr() == ("", "")
    assert (stream.getvalue().splitlines() if stream else caplog.messages) == caplog.messages


def test_a_stream_that_is_a_terminal_gets_the_bar_and_no_lines(caplog: pytest.LogCaptureFixture) -> None:
    run, terminal = Run([20_000] * 4, [0] * 4), Terminal()
    progress = Progress(4, since=SINCE, shown=terminal, clock=run.clock)
    with caplog.at_level("INFO", logger="flexgen_helm.runtime.progress"):
        for snapshot in run.snapshots():
            progress.update(snapshot)
    text = progress.finish(STATS)
    assert "%|" in terminal.getvalue()
    assert terminal.getvalue().endswith(f"{text}\n")
    assert caplog.messages == []


def test_summary_says_what_was_saved() -> None:
    assert summary(STATS) == (
        "1,200 requests in 24.0 s: 60,000 prompt tokens asked, 10,000 computed, 2,000 generated, 9 sweeps, "
        "500 tokens/s, peak memory 1.50 GiB"
    )
    assert summary(RunStats()).startswith("0 requests in 0.0 s")


def test_summary_says_what_was_moved_how_fast_and_what_was_held() -> None:
    moved, busy = {"disk_read": 2**31, "cpu_attention": 7}, {"disk_read": 2.0, "device": 3.0}
    stats = dataclasses.replace(STATS, bytes_moved=moved, busy_seconds=busy, tier_peak_bytes={"host": 3 * 2**30, "disk": 2**30})
    assert summary(stats) == (
        f"{summary(STATS)}, disk read 2.00 GiB at 1.07 GB/s, at most 3.00 GiB on host, at most 1.00 GiB on disk"
    )
    sparse = dataclasses.replace(stats, bytes_saved={"disk_read": 0})
    assert "disk read 2.00 GiB at 1.07 GB/s, 0 bytes saved there by sparsity, at most" in summary(sparse)
