"""How often a gate on flips raises a false alarm, and how often it catches a drop, by how many answers change.

The gate is the one-sided exact McNemar test of right and wrong answers, pooled over five tasks: it fails where p is at most its
level. Each rate is simulated with the package's own functions and, in brackets, computed exactly. Pairs are independent here.
Cost: a minute and a half on one core.

Command: ``python -m flexgen_helm.runs.gate_rates --json result.json``
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

import numpy as np

from flexgen_helm.runs.command_line import add_json, make_parser, reports_errors, write_json
from flexgen_helm.runs.gate_rates.rates import Case, exact_rate, greatest_disagreement, simulated_rate

DISAGREEMENTS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.025, 0.03, 0.04, 0.05, 0.1)
SEED = 0
FALSE_ALARMS = 0.01
"""Most false alarms that are asked for."""


@dataclass(frozen=True)
class Asked:
    """A rate that is asked of the gate."""

    case: Case
    name: str
    power: float | None
    """Least share of alarms; None: there is no drop, and at most `FALSE_ALARMS` are wanted."""


ASKED = (
    Asked(Case(500, 0.0), "no drop, 500 pairs", None),
    Asked(Case(10_000, 0.0), "no drop, 10,000 pairs", None),
    Asked(Case(500, 0.02), "2 points, 500 pairs", 0.95),
    Asked(Case(10_000, 0.005), "0.5 points, 10,000 pairs", 0.8),
)


@dataclass(frozen=True)
class Rate:
    """One cell of the table."""

    level: float
    disagreement: float
    case: Case
    simulated: float
    exact: float


def measured(level: float, disagreement: float, datasets: int, generator: np.random.Generator) -> list[Rate | None]:
    """Measure a row of the table; None where so few answers change that the score cannot fall so far."""
    return [
        Rate(
            level,
            disagreement,
            asked.case,
            simulated_rate(asked.case, disagreement, level, datasets=datasets, generator=generator),
            exact_rate(asked.case, disagreement, level),
        )
        if asked.case.possible(disagreement)
        else None
        for asked in ASKED
    ]


def row(level: float, disagreement: float, rates: list[Rate | None]) -> str:
    """Format a row of the table."""
    cells = ["impossible" if rate is None else f"{rate.simulated:.1%} ({rate.exact:.2%})" for rate in rates]
    return f"| {level:.1%} | {disagreement:.1%} | " + " | ".join(cells) + " |"


def conclusions(level: float) -> list[str]:
    """Say up to which disagreement rate a gate of this level does what is asked, by the exact rates."""
    lines = [f"At a level of {level:.1%}:"]
    for asked in ASKED:
        if asked.power is None:
            worst = max(exact_rate(asked.case, rate, level) for rate in DISAGREEMENTS)
            verdict = "holds" if worst <= FALSE_ALARMS else "does not hold everywhere"
            lines.append(f"- {asked.name}: at most {worst:.2%} false alarms; at most {FALSE_ALARMS:.0%} {verdict}")
            continue
        greatest = greatest_disagreement(asked.case, level, asked.power)
        wanted = f"- {asked.name}: caught at {asked.power:.0%}"
        if greatest is None:
            best = exact_rate(asked.case, asked.case.drop, level)
            lines.append(f"{wanted} at no disagreement rate; {best:.1%} if no answer is gained")
        else:
            gained = (greatest - asked.case.drop) / 2
            lines.append(f"{wanted} up to a disagreement rate of {greatest:.2%}, that is {gained:.2%} of the answers gained")
    return lines


@reports_errors
def main() -> int:
    """Measure and print a table."""
    parser = make_parser("gate_rates", __doc__)
    parser.add_argument("--levels", nargs="+", type=float, default=[0.01, 0.05], help="levels of the gate, from 0 to 1")
    parser.add_argument("--datasets", type=int, default=4000, help="simulated data sets for each rate")
    add_json(parser)
    options = parser.parse_args()
    if options.datasets < 1 or not all(0 < level < 1 for level in options.levels):
        parser.error("a level lies between 0 and 1, and at least one data set is needed")
    found, generator = [], np.random.default_rng(SEED)
    print("| level | disagreement | " + " | ".join(asked.name for asked in ASKED) + " |\n|" + "---|" * (2 + len(ASKED)))
    for level in options.levels:
        for disagreement in DISAGREEMENTS:
            rates = measured(level, disagreement, options.datasets, generator)
            found += [asdict(rate) for rate in rates if rate is not None]
            print(row(level, disagreement, rates), flush=True)
    for level in options.levels:
        print("\n" + "\n".join(conclusions(level)))
    write_json(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
