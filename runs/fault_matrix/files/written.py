"""What reports and gates read: HELM's files of a suite, and a baseline."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from flexgen_helm.gate.baseline import read_baseline, to_text, write_baseline
from flexgen_helm.gate.evidence import digested
from flexgen_helm.reports.answers import Answers, read_answers
from flexgen_helm.reports.comparing import read_metrics
from flexgen_helm.reports.runs import list_runs, read_workloads
from flexgen_helm.reports.selection import select_one
from flexgen_helm.runs.fault_matrix.outcomes import Verdict

DATE = "2026-01-01T00:00:00+00:00"


def _answers(suite: Path) -> Answers:
    selection = select_one(str(suite), suite)
    return digested(read_answers(selection, read_metrics(suite / "schema.json", required=False), name="suite"))


class Suite:
    """HELM's files of a suite, and what this package writes beside them. They have no checksums: HELM's are as they are."""

    mends = False

    def __init__(self, suite: Path) -> None:
        """Args: suite: Folder of a whole one."""
        self._suite = suite
        self._right = ""

    def make(self, folder: Path) -> None:
        """Make the files."""
        shutil.copytree(self._suite, folder / "suite")

    def files(self, folder: Path) -> Sequence[Path]:
        """Return the files that may be damaged."""
        return sorted((folder / "suite").rglob("*.json"))

    def read(self, folder: Path) -> tuple[Verdict, str]:
        """Read them; see `Subject`."""
        self._right = self._right or self._read(self._suite)
        return ("answered" if self._read(folder / "suite") == self._right else "another"), ""

    @staticmethod
    def _read(suite: Path) -> str:
        """Read every file that reports read, as the text of a baseline and of what a baseline leaves out."""
        runs = [(run.spec, run.requests(), run.stats(), run.instance_stats(), run.record()) for run in list_runs(suite)]
        return f"{to_text(_answers(suite), date=DATE)}{runs}{read_workloads(suite)}"


class Baseline:
    """A baseline file of the gate."""

    mends = False

    def __init__(self, suite: Path) -> None:
        """Args: suite: Folder of the suite that it is recorded of."""
        self._suite = suite
        self._right = ""

    def make(self, folder: Path) -> None:
        """Make the files."""
        write_baseline(folder / "baseline.json", _answers(self._suite), date=DATE)

    def files(self, folder: Path) -> Sequence[Path]:
        """Return the files that may be damaged."""
        return [folder / "baseline.json"]

    def read(self, folder: Path) -> tuple[Verdict, str]:
        """Read them; see `Subject`."""
        self._right = self._right or to_text(_answers(self._suite), date=DATE)
        text = to_text(read_baseline(folder / "baseline.json"), date=DATE)
        # What a baseline rounds and leaves out is no part of it.
        return ("answered", "") if text == self._right else ("wrong", "a baseline of other content")
