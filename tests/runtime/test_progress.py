"""The bar and its estimate on simulated runs, whose true cost is known."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from flexgen_helm.runtime.progress import Progress, TimeLeft, summary
from flexgen_helm.runtime.worker import Snapshot
from flexgen_helm.types import RunStats

SECONDS_PER_PROMPT_TOKEN = 0.001
SECONDS_PER_NEW_TOKEN = 0.02
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
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    @property
    def seconds(self) -> list[float]:
        pairs = zip(self.prompts, self.tokens, strict=True)
        return [prompt * SECONDS_PER_PROMPT_TOKEN + new * SECONDS_PER_NEW_TOKEN for prompt, new in pairs]

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
        Run([0, *[20] * 20, 3000, 3000], [1, *[64] * 20, 0, 0]),
    ],
    ids=["scoring", "decoding", "prompts first", "prompts last"],
)
def test_time_left_comes_from_the_cost_of_each_kind(run: Run) -> None:
    estimate = TimeLeft(SINCE, run.clock)
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


def test_completions_that_end_early_are_foreseen() -> None:
    """Of a budget of 50 tokens only 10 are used: the rest of the run takes a fifth of the budget's time."""
    run = Run([0] * 100, [8] * 100, ended_early=[32] * 100)
    estimate = TimeLeft(SINCE, run.clock)
    for snapshot in run.snapshots():
        estimate.observe(snapshot)
        if snapshot.sweeps - SINCE.sweeps == 50:
            break
    assert estimate.seconds() == pytest.approx(sum(run.seconds) / 2, rel=0.05)


def test_first_sweep_knows_its_end_only_if_nothing_follows() -> None:
    single, several = Run([500], [0]), Run([500, 500], [0, 0])
    estimates = []
    for run in (single, several):
        estimate = TimeLeft(SINCE, run.clock)
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
    # 100 prompt tokens in 0.1 s, then half of a sweep of 0.3 s.
    assert progress.line().startswith("1/3 requests, sweep 2 (50%), 400 tokens/s, ")


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


def test_summary_says_what_was_saved() -> None:
    assert summary(STATS) == (
        "1,200 requests in 24.0 s: 60,000 prompt tokens asked, 10,000 computed, 2,000 generated, 9 sweeps, "
        "500 tokens/s, peak memory 1.50 GiB"
    )
    assert summary(RunStats()).startswith("0 requests in 0.0 s")
