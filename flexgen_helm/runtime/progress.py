"""Progress bar of a run: requests, sweeps, tokens per second, and the estimated time left."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from flexgen_helm.memory.amounts import gib
from flexgen_helm.run_stats import RunStats
from flexgen_helm.runtime.bars import make_bar
from flexgen_helm.types import LINKS, FinishReason, Result

if TYPE_CHECKING:
    from flexgen_helm.runtime.worker import Snapshot

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 0.1
"""Least seconds between two drawings of the bar; it is updated after every operation."""

LINE_SECONDS = 30.0
"""Seconds between two lines of progress if there is no terminal for a bar."""

_STEPS = 1000

_DECAY = 0.9
"""Weight of a sweep relative to the one after it."""

_ALIKE = 0.9
"""Squared cosine above which the mixes of prompts and decoding in sweeps are too similar to tell their costs apart."""


class TimeLeft:
    """Estimates the time that a run still needs, from the time of its sweeps so far.

    A prompt token has a cost, and a decode step has a cost. That of a decode step is nearly the same for few sequences as for
    many, because rows have a fixed size. Both costs are fitted to the last sweeps by least squares. The number of new tokens
    is estimated from the remaining budgets and from the share of tokens that ended their completion early.
    """

    def __init__(self, num_requests: int, *, since: Snapshot, clock: Callable[[], float]) -> None:
        """Start with the state before a run.

        Args:
            num_requests: Requests of the run.
            since: The worker's progress before the run.
            clock: Function that returns the time in seconds.
        """
        self._clock = clock
        self._began = clock()
        self._since = self._now = self._sweep_end = since
        self._requests_left, self._requests_done = num_requests, 0
        self._completions_done = self._ended_early = 0
        self._sequences = self._most_sequences = 0
        self._tokens = self._seconds = 0.0
        # Weighted sums over the sweeps: products of prompt tokens, decode steps (0 or 1 in a sweep) and seconds.
        self._pp = self._ps = self._ss = self._pt = self._st = 0.0

    def ended(self, reasons: Sequence[FinishReason]) -> None:
        """Count a request that has ended.

        Args:
            reasons: Finish reasons of its completions.
        """
        self._requests_left -= 1
        self._requests_done += 1
        self._completions_done += len(reasons)
        self._ended_early += sum(reason != "length" for reason in reasons)

    def observe(self, snapshot: Snapshot) -> None:
        """Record the state after an operation. It must be called for every operation, in their order."""
        if snapshot.sweeps != self._now.sweeps:
            end, now = self._sweep_end, self._clock()
            self._sequences = snapshot.generated_tokens - end.generated_tokens
            self._most_sequences = max(self._most_sequences, self._sequences)
            self._add(now - self._began, snapshot.prompt_tokens - end.prompt_tokens)
            self._began, self._sweep_end = now, snapshot
        self._now = snapshot

    def seconds(self) -> float | None:
        """Return the estimate in seconds; None during a first sweep that others follow, because their cost is unknown."""
        now, elapsed = self._now, self._clock() - self._began
        started = now.sweep_share > 0
        this_sweep = elapsed * (1 - now.sweep_share) / now.sweep_share if started else 0.0
        if not now.prompt_tokens_left and not now.new_tokens_left:
            return this_sweep if started or now.sweeps > self._since.sweeps else None
        if not self._pp and not self._ss:
            return None
        per_prompt_token, per_new_token = self._costs()
        return this_sweep + per_prompt_token * now.prompt_tokens_left + per_new_token * self._new_tokens_expected()

    def _new_tokens_expected(self) -> float:
        budget, generated = self._now.new_tokens_left, self._now.generated_tokens - self._since.generated_tokens
        if not budget or not generated or not self._ended_early:
            return budget
        # A geometric length, cut at the budget. Tokens of living completions are chances to end that were not taken.
        end = min(self._ended_early / generated, 1.0)
        count = max(self._requests_left, 1) * self._completions_done / self._requests_done
        return min(budget, count * (1 - math.pow(1 - end, budget / count)) / end)

    def _add(self, seconds: float, prompt_tokens: int) -> None:
        steps = int(self._sequences > 0)
        self._tokens = _DECAY * self._tokens + prompt_tokens + self._sequences
        self._seconds = _DECAY * self._seconds + seconds
        self._pp = _DECAY * self._pp + prompt_tokens * prompt_tokens
        self._ps = _DECAY * self._ps + prompt_tokens * steps
        self._ss = _DECAY * self._ss + steps * steps
        self._pt = _DECAY * self._pt + prompt_tokens * seconds
        self._st = _DECAY * self._st + steps * seconds

    def _costs(self) -> tuple[float, float]:
        """Return seconds for a prompt token and for a new token."""
        # Waiting prompts will fill the block again; without any, only the live sequences are left.
        sequences = max(self._most_sequences if self._now.prompt_tokens_left else self._sequences, 1)
        if not self._pp:
            return self._st / self._ss / sequences, self._st / self._ss / sequences
        if self._ps**2 >= _ALIKE * self._pp * self._ss:
            return self._seconds / self._tokens, self._seconds / self._tokens
        determinant = self._pp * self._ss - self._ps**2
        prompt = (self._pt * self._ss - self._st * self._ps) / determinant
        step = (self._st * self._pp - self._pt * self._ps) / determinant
        if prompt < 0:
            prompt, step = 0.0, self._st / self._ss
        elif step < 0:
            prompt, step = self._pt / self._pp, 0.0
        return prompt, step / sequences


class Progress:
    """The bar of one run, or lines if there is no terminal. It moves within a sweep, so that a long one never looks hung."""

    def __init__(
        self,
        num_requests: int,
        *,
        since: Snapshot,
        shown: bool | TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin to show progress.

        Args:
            num_requests: Requests of this run.
            since: The worker's progress before the run.
            shown: True: a bar on stderr; False: nothing; None: a bar if stderr is a terminal or a notebook's, else lines in
                the log; a stream: a bar on it if it is a terminal or a notebook's, else lines.
            clock: Function that returns the time in seconds, for tests.
        """
        self._num_requests = num_requests
        self._num_done = 0
        self._since = self._last = since
        self._clock = clock
        self._began = clock()
        self._drawn, self._said = -REFRESH_SECONDS, self._began
        self._stream = None if shown is None or isinstance(shown, bool) else shown
        self._time_left = TimeLeft(num_requests, since=since, clock=clock)
        self._bar = make_bar(
            total=_STEPS,
            stream=self._stream,
            disable=not shown if isinstance(shown, bool) else None,
            bar_format="{percentage:3.0f}%|{bar}| {desc}",
        )
        self._in_lines = self._bar.disable and not isinstance(shown, bool)

    def request_done(self, result: Result | None = None) -> None:
        """Count one finished request.

        Args:
            result: Its result, from which the estimate learns how often completions end early.
        """
        self._num_done += 1
        self._time_left.ended([completion.finish_reason for completion in result.completions] if result else [])

    def update(self, snapshot: Snapshot) -> None:
        """Record the state after an operation, and draw the bar if it was not drawn for `REFRESH_SECONDS`."""
        self._time_left.observe(snapshot)
        self._last = snapshot
        now = self._clock()
        if self._in_lines and now - self._said >= LINE_SECONDS:
            self._said = now
            logger.info("%s", self.line())
            if self._stream is not None:
                print(self.line(), file=self._stream, flush=True)
        if self._bar.disable or now - self._drawn < REFRESH_SECONDS:
            return
        self._drawn = now
        self._bar.n = max(self._bar.n, round(_STEPS * self._share()))
        self._bar.set_description_str(self.line())

    def line(self) -> str:
        """Return the text of the bar: requests, sweep, tokens per second and time left."""
        last, seconds = self._last, max(self._clock() - self._began, 1e-9)
        tokens = (last.prompt_tokens - self._since.prompt_tokens) + (last.generated_tokens - self._since.generated_tokens)
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
            print(text, file=self._stream or sys.stderr)
        return text

    def _share(self) -> float:
        """Return the share of the run's time that has passed, at most 0.99."""
        elapsed, left = self._clock() - self._began, self._time_left.seconds()
        return 0.0 if left is None or elapsed <= 0 else min(elapsed / (elapsed + left), 0.99)


def summary(stats: RunStats) -> str:
    """Return one line about a run: counts and rates, and if bytes were moved the links' rates and each tier's peak."""
    tokens = stats.prompt_tokens_computed + stats.generated_tokens
    parts = [
        f"{stats.num_jobs:,} requests in {stats.seconds:.1f} s: {stats.prompt_tokens_asked:,} prompt tokens asked",
        f"{stats.prompt_tokens_computed:,} computed",
        f"{stats.generated_tokens:,} generated",
        f"{stats.sweeps:,} sweeps",
        f"{tokens / max(stats.seconds, 1e-9):,.0f} tokens/s",
        f"peak memory {gib(stats.peak_bytes)}",
    ]
    for link in (link for link in LINKS if stats.bytes_moved.get(link)):
        moved, busy = stats.bytes_moved[link], stats.busy_seconds.get(link, 0.0)
        parts.append(f"{link.replace('_', ' ')} {gib(moved)} at {moved / 1e9 / max(busy, 1e-9):.2f} GB/s")
        if link in stats.bytes_saved:
            parts.append(f"{gib(max(0, stats.bytes_saved[link]))} saved there by sparsity")
    if stats.bytes_moved:
        parts += [f"at most {gib(count)} on {tier}" for tier, count in stats.tier_peak_bytes.items()]
    return ", ".join(parts)
