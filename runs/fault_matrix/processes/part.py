"""The parts that disturb commands, in one process: imports, model and undisturbed suite are those of all."""

from __future__ import annotations

from pathlib import Path

from flexgen_helm.runs.fault_matrix.cases import CLOCKS, TWINS
from flexgen_helm.runs.fault_matrix.notes import use_own_notes
from flexgen_helm.runs.fault_matrix.outcomes import Outcome
from flexgen_helm.runs.fault_matrix.processes.clock import ClockPart
from flexgen_helm.runs.fault_matrix.processes.disks import DisksPart
from flexgen_helm.runs.fault_matrix.processes.kills import KillsPart
from flexgen_helm.runs.fault_matrix.processes.twins import TwinsPart
from flexgen_helm.runs.fault_matrix.processes.undisturbed import Undisturbed


class ProcessesPart:
    """See `flexgen_helm.runs.fault_matrix.worker.Part`."""

    def __init__(self, folder: Path) -> None:
        use_own_notes(folder)
        whole = Undisturbed.made_in(folder)
        kills = KillsPart(folder, whole)
        self._parts = {
            "suite": kills,
            "fit": kills,
            "disk": DisksPart(folder, whole),
            **dict.fromkeys(TWINS, TwinsPart(folder, whole)),
            **dict.fromkeys(CLOCKS, ClockPart(folder, whole)),
        }

    def run(self, case: str) -> list[Outcome]:
        """Let the part to which a case belongs, by its first word, try it."""
        outcomes: list[Outcome] = self._parts[case.split()[0]].run(case)
        return outcomes
