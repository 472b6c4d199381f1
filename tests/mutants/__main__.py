"""Tries faults one at a time and prints which of them the tests notice: ``python -m tests.mutants``."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.lists import MUTANTS
from tests.mutants.mutant import Mutant, MutantError
from tests.mutants.trial import Copy, Outcome

ROOT = Path(__file__).resolve().parents[2]
LEAST_KILLED = 0.95


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutants that were asked for; returns 0 if enough were killed, 1 if not, 2 if some could not be tried."""
    options = _parser().parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if any(fnmatch.fnmatch(mutant.name, pattern) for pattern in options.names)]
    if not chosen:
        print(f"No mutant is called {' or '.join(options.names)}. See --list.", file=sys.stderr)
        return 2
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:36} {mutant.file:42} {mutant.why}")
        return 0
    with tempfile.TemporaryDirectory(prefix="flexgen_helm_mutants_") as folder:
        copies = [Copy(ROOT, Path(folder, str(number))) for number in range(options.jobs)]
        try:
            if options.baseline and not _unmutated_tests_pass(copies[0], chosen):
                return 2
            outcomes = list(_report(chosen, copies))
        finally:
            for copy in copies:
                copy.close()
    return _summary(outcomes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], help="names or patterns of mutants, such as 'journal-*' (all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants tried in parallel (1)")
    parser.add_argument("--list", action="store_true", help="list the mutants and try none")
    parser.add_argument(
        "--no-baseline",
        dest="baseline",
        action="store_false",
        help="do not first check that the tests pass without a mutant; without this check a failing test kills everything",
    )
    return parser


def _unmutated_tests_pass(copy: Copy, mutants: Sequence[Mutant]) -> bool:
    tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    outcome = copy.run(tests)
    if outcome.verdict != "survived":
        print(f"Tests fail without any mutant, so they say nothing: {outcome.detail}", file=sys.stderr)
        return False
    print(f"all tests pass without a mutant ({outcome.seconds:.0f} s)", flush=True)
    return True


def _report(mutants: Sequence[Mutant], copies: Sequence[Copy]) -> Iterator[Outcome]:
    """Try mutants, each in whichever copy is free, and print what became of them in their order."""
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def attempt(mutant: Mutant) -> Outcome:
        copy = free.get()
        try:
            return copy.try_mutant(mutant)
        except MutantError as error:
            return Outcome("error", 0.0, str(error))
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        for mutant, outcome in zip(mutants, pool.map(attempt, mutants), strict=True):
            detail = outcome.detail or mutant.why
            print(f"{outcome.verdict:8} {outcome.seconds:5.0f} s  {mutant.name:36} {detail}", flush=True)
            yield outcome


def _summary(outcomes: Sequence[Outcome]) -> int:
    counts = {verdict: sum(outcome.verdict == verdict for outcome in outcomes) for verdict in ("killed", "survived", "error")}
    share = counts["killed"] / len(outcomes)
    print(f"{counts['killed']} killed, {counts['survived']} survived, {counts['error']} errors: {share:.0%} killed")
    if counts["error"]:
        return 2
    return 0 if share >= LEAST_KILLED else 1


if __name__ == "__main__":
    sys.exit(main())
