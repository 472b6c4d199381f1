"""The cost of everything but the model: a suite through ``helm-run`` on a model of one tiny layer.

Half of the requests are 5-shot multiple choice, a quarter scores single choices, a quarter generates 20 tokens; tokenizer,
engine, scheduler and HELM are the real ones. Sizes double, so that a step that grows faster than the number of requests shows:
of two sizes n and m, the exponent is log(time(n) / time(m)) / log(n / m), in processor time.
Cost: about 12 minutes on one core of a server CPU for the default sizes, 3 GiB of memory.

Command: ``python -m flexgen_helm.runs.helm_overhead --json result.json``
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.reports.runs import list_runs, read_workloads
from flexgen_helm.runs.command_line import add_json, add_model, make_parser, reports_errors, write_json
from flexgen_helm.runs.helm_overhead.commands import RUNNER, Finished, helm_run
from flexgen_helm.runs.helm_overhead.null_model import save_null_model
from flexgen_helm.runs.helm_overhead.questions import LEAST_REQUESTS, suite_entries
from flexgen_helm.runs.helm_overhead.sampled import STEPS, TIMED

ROUTES = {
    "runner": ["--num-threads", "1", "--runner-class-name", RUNNER],
    "client": ["--num-threads", "64"],
}
LOCKED = "database is locked"
LINEAR = 1.2
"""An exponent above this is faster than linear: sorting has 1.12 at these sizes, and a shared machine adds noise."""
SMALL = 0.01
"""Steps below this share of the whole are not judged."""


@dataclass(frozen=True)
class Measured:
    """One suite."""

    route: str
    cache: bool
    requests: int
    wall_s: float
    steps_s: dict[str, float]
    processor_s: dict[str, float]
    engine_s: float | None
    """Seconds of ``Engine.run``; unknown for the client."""
    locked: int
    """Lines of the log that say "database is locked"."""

    @property
    def requests_per_second(self) -> float:
        """By the wall clock of the command, its start included."""
        return self.requests / self.wall_s

    def line(self) -> str:
        """Return the line that a person reads."""
        cache = "cache" if self.cache else "--disable-cache"
        return (
            f"{self.route:7} {cache:16} {self.requests:6} requests in {self.wall_s:6.1f} s, "
            f'{self.requests_per_second:6.1f} requests/s, "{LOCKED}" {self.locked} times'
        )


def measure(folder: Path, model: Path, num_requests: int, *, route: str, cache: bool, threads: int) -> Measured:
    """Run a suite of new questions in a new folder."""
    entries = suite_entries(folder / "questions", num_requests)
    arguments = [*ROUTES[route], "-m", str(num_requests), *([] if cache else ["--disable-cache"])]
    models = [f"{entry},model=flexgen/{model}" for entry in entries]
    finished = helm_run(models, folder / "output", arguments, threads=threads, watch="all")
    answered = sum(len(run.requests()) for run in list_runs(finished.suite))
    return Measured(
        route=route,
        cache=cache,
        requests=answered,
        wall_s=finished.wall_s,
        steps_s=finished.steps_s,
        processor_s=finished.processor_s,
        engine_s=_engine_seconds(finished),
        locked=finished.log.count(LOCKED),
    )


def _engine_seconds(finished: Finished) -> float | None:
    workloads = read_workloads(finished.suite)
    if not workloads:
        return None
    return float(sum(one.measured["stats"]["seconds"] for one in workloads if one.measured is not None))


def exponents(smaller: Measured, larger: Measured) -> dict[str, float]:
    """With which power of the number of requests each step grows, for steps that take a share of both."""
    growth = math.log(larger.requests / smaller.requests)
    if not growth:
        return {}
    times = [one.processor_s for one in (smaller, larger)]
    steps = [step for step in {**STEPS, **TIMED} if all(time.get(step, 0) >= SMALL * sum(time.values()) for time in times)]
    return {step: math.log(times[1][step] / times[0][step]) / growth for step in steps}


def table(measured: list[Measured]) -> list[str]:
    """Processor time of each step by size, and how it grows."""
    grown = [exponents(*pair) for pair in pairwise(measured)]
    overall = exponents(measured[0], measured[-1])
    sizes = "".join(f"{one.requests:9}" for one in measured)
    lines = [f"{'processor seconds':22}{sizes}   exponents of each doubling, and over all"]
    for step in dict.fromkeys(step for one in measured for step in (*STEPS, *TIMED, *one.processor_s)):
        times = "".join(f"{one.processor_s.get(step, 0):9.2f}" for one in measured)
        powers = [grow.get(step) for grow in [*grown, overall]]
        shown = "".join("     -" if power is None else f"{power:6.2f}" for power in powers)
        lines.append(f"{step:22}{times}   {shown}{'  faster than linear' if overall.get(step, 0) > LINEAR else ''}")
    totals = "".join(f"{sum(one.processor_s.values()):9.2f}" for one in measured)
    return [*lines, f"{'all':22}{totals}"]


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    parser = make_parser("helm_overhead", __doc__)
    parser.add_argument("--requests", type=int, nargs="+", default=[1250, 2500, 5000, 10000], metavar="N", help="sizes")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    add_model(parser, "--tokenizer")
    parser.add_argument("--only-growth", action="store_true", help="leave out the largest size with cache and by client")
    add_json(parser)
    options = parser.parse_args()
    sizes = sorted(options.requests)
    if sizes[0] < LEAST_REQUESTS:
        parser.error(f"--requests {sizes[0]}: a suite of all kinds of requests has at least {LEAST_REQUESTS}")
    plan = [("runner", False, size) for size in sizes]
    if not options.only_growth:
        plan += [("runner", True, sizes[-1]), ("client", True, sizes[-1])]
    measured = []
    with tempfile.TemporaryDirectory() as name:
        model = save_null_model(Path(name) / "null" / "model", options.tokenizer or smollm2_folder())
        for number, (route, cache, size) in enumerate(plan):
            folder = Path(name) / str(number)
            folder.mkdir()
            measured.append(measure(folder, model, size, route=route, cache=cache, threads=options.threads))
            print(measured[-1].line(), flush=True)
    growing = measured[: len(sizes)]
    print("\n".join(["", *table(growing)]))
    results = [dataclasses.asdict(one) | {"requests_per_second": one.requests_per_second} for one in measured]
    write_json(options.json, {"suites": results, "exponents": exponents(growing[0], growing[-1])})
    return 0


if __name__ == "__main__":
    sys.exit(main())
