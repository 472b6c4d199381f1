"""One progress bar for a run: requests, sweeps, tokens per second, and the time that the work left will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Never

from tqdm import tqdm

from flexgen_helm.types import RunStats

if TYPE_CHECKING:
    from flexgen_helm.runtime.worker import Snapshot

REFRESH_SECONDS = 0.1
"""The bar is drawn at most this often: it is told of every row of every layer."""

_STEPS = 1000

_DECAY = 0.9
"""Weight of a sweep relative to the one after it: near the end of a run few sequences share the cost of a row."""


class TimeLeft:
    """Estimates the time that a run still needs, from what its prompt tokens and new tokens have cost so far.

    A prompt token shares its row with many others and a new token with few, so each kind has its own cost, fitted to
    the last sweeps by least squares. Completions that end early return the rest of their budget: of the budget that
    is left, the share is expected to be used that was used of the budget so far.
    """

    def __init__(self, since: Snapshot, clock: Callable[[], float]) -> None:
        """Start at ``since``, the state before the run."""
        self._clock = clock
        self._began = clock()
        self._first = since.sweeps
        self._now, self._sweep_end = since, since
        self._generated = self._retired = 0
        # Weighted sums over the sweeps: products of prompt tokens, new tokens and seconds.
        self._pp = self._pn = self._nn = self._pt = self._nt = 0.0

    def observe(self, snapshot: Snapshot) -> None:
        """Take in the state after an operation; every one must be shown, in their order."""
        last, end = self._now, self._sweep_end
        self._now = snapshot
        if snapshot.sweeps != last.sweeps:
            new_tokens = snapshot.generated_tokens - end.generated_tokens
            self._add(self._clock() - self._began, snapshot.prompt_tokens - end.prompt_tokens, new_tokens)
            self._generated += new_tokens
            self._began, self._sweep_end = self._clock(), snapshot
        elif last is end:
            # How much of the budget a sweep retired shows only when the next one is planned.
            self._retired += max(0, last.new_tokens_left - snapshot.new_tokens_left)

    def seconds(self) -> float | None:
        """Return the estimate in seconds, None in a first sweep that others follow: nothing is known of their cost."""
        now, elapsed = self._now, self._clock() - self._began
        this_sweep = elapsed * (1 - now.sweep_share) / now.sweep_share if now.sweep_share else 0.0
        if not now.prompt_tokens_left and not now.new_tokens_left:
            return this_sweep if now.sweep_share or now.sweeps > self._first else None
        if not self._pp and not self._nn:
            return None
        per_prompt_token, per_new_token = self._costs()
        new_tokens = now.new_tokens_left * min(1.0, self._generated / max(1, self._retired))
        return this_sweep + per_prompt_token * now.prompt_tokens_left + per_new_token * new_tokens

    def _add(self, seconds: float, prompt_tokens: int, new_tokens: int) -> None:
        self._pp = _DECAY * self._pp + prompt_tokens * prompt_tokens
        self._pn = _DECAY * self._pn + prompt_tokens * new_tokens
        self._nn = _DECAY * self._nn + new_tokens * new_tokens
        self._pt = _DECAY * self._pt + prompt_tokens * seconds
        self._nt = _DECAY * self._nt + new_tokens * seconds

    def _costs(self) -> tuple[float, float]:
        """Return seconds for a prompt token and for a new token, neither negative."""
        if not self._pp or not self._nn:
            cost = (self._pt + self._nt) / (self._pp + self._nn)
            return cost, cost
        determinant = self._pp * self._nn - self._pn**2
        if determinant > 1e-6 * self._pp * self._nn:
            prompt = (self._pt * self._nn - self._nt * self._pn) / determinant
            new = (self._nt * self._pp - self._pt * self._pn) / determinant
            if prompt >= 0 and new >= 0:
                return prompt, new
            return (0.0, self._nt / self._nn) if prompt < 0 else (self._pt / self._pp, 0.0)
        # All sweeps mixed both kinds alike, so their costs cannot be told apart.
        cost = (self._pt + self._nt) / (self._pp + 2 * self._pn + self._nn)
        return cost, cost


class Progress:
    """The bar of one run. It moves within a sweep as well, so that a long one never looks hung."""

    def __init__(
        self,
        num_requests: int,
        *,
        since: Snapshot,
        shown: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Show a bar.

        Args:
            num_requests: Requests of this run.
            since: Counts before the run.
            shown: Whether to draw; None: only where stderr is a terminal.
            clock: Seconds, for tests.
        """
        self._num_requests = num_requests
        self._num_done = 0
        self._since = self._last = since
        self._clock = clock
        self._began = clock()
        self._drawn = -REFRESH_SECONDS
        self._time_left = TimeLeft(since, clock)
        self._bar: tqdm[Never] = tqdm(
            total=_STEPS,
            disable=None if shown is None else not shown,
            bar_format="{percentage:3.0f}%|{bar}| {desc}",
            leave=False,
        )

    def request_done(self) -> None:
        """Count one finished request."""
        self._num_done += 1

    def update(self, snapshot: Snapshot) -> None:
        """Take in the state after an operation; cheap, and drawn only so often."""
        self._time_left.observe(snapshot)
        self._last = snapshot
        now = self._clock()
        if self._bar.disable or now - self._drawn < REFRESH_SECONDS:
            return
        self._drawn = now
        self._bar.n = max(self._bar.n, round(_STEPS * self._share()))
        self._bar.set_description_str(self.line())

    def line(self) -> str:
        """Return what the bar says, without the bar."""
        last, seconds = self._last, max(self._clock() - self._began, 1e-9)
        tokens = (last.prompt_tokens - self._since.prompt_tokens) + (
            last.generated_tokens - self._since.generated_tokens
        )
        left = self._time_left.seconds()
        return (
            f"{self._num_done}/{self._num_requests} requests, sweep {last.sweeps - self._since.sweeps + 1} "
            f"({last.sweep_share:.0%}), {tokens / seconds:,.0f} tokens/s, "
            f"{'?' if left is None else tqdm.format_interval(left)} left"
        )

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def finish(self, stats: RunStats) -> str:
        """Remove the bar, print the summary in its place if it was shown, and return the summary."""
        text = summary(stats)
        shown = not self._bar.disable
        self.close()
        if shown:
            print(text, file=sys.stderr)
        return text

    def _share(self) -> float:
        """Share of the run's time that has passed, below 1 until it is closed."""
        elapsed, left = self._clock() - self._began, self._time_left.seconds()
        return 0.0 if left is None or elapsed <= 0 else min(elapsed / (elapsed + left), 0.99)


def summary(stats: RunStats) -> str:
    """Return one line on what a run did."""
    tokens = stats.prompt_tokens_computed + stats.generated_tokens
    return (
        f"{stats.num_jobs:,} requests in {stats.seconds:.1f} s: {stats.prompt_tokens_asked:,} prompt tokens asked, "
        f"{stats.prompt_tokens_computed:,} computed, {stats.generated_tokens:,} generated, {stats.sweeps:,} sweeps, "
        f"{tokens / max(stats.seconds, 1e-9):,.0f} tokens/s, peak memory {stats.peak_bytes / 2**30:.2f} GiB"
    )
