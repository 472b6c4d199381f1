"""Print what rows of large models cost in a layer, as a table in Markdown: ``python -m tests.simulated_gpu.layer_costs``."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from tests.simulated_gpu.layer_costs.rows import FIRST, Case, Cost, cases, counts_of
from tests.simulated_gpu.layer_costs.times import GOALS, times_of

COLUMNS = (
    *("model", "row", "attention", "layer", "launches", "copies", "waits"),
    *("GB of kernels", "GB up", "GB down", "Python, ms", "device, ms", "link, ms", "layer, ms", "goal, ms"),
)


def line(case: Case, j: int, cost: Cost) -> str:
    """Return a line of the table."""
    both, times = cost.row + cost.weights, times_of(cost)
    goal = GOALS.get(case.model)
    cells = [
        *(case.model, case.rows, case.attention, "first" if j == FIRST else "steady"),
        *(f"{both.launches:,}", f"{both.copies}", f"{both.waits}"),
        *(f"{count / 1e9:.3f}" for count in (both.num_bytes, both.up, both.down)),
        *(f"{seconds * 1e3:.2f}" for seconds in (*times, times.layer(both.waits))),
        "" if goal is None else f"{goal * 1e3:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Count every case, and print each line when it is known."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for case in cases():
        with TemporaryDirectory() as folder:
            for j, cost in counts_of(case, Path(folder)).items():
                print(line(case, j, cost), flush=True)


if __name__ == "__main__":
    main()
