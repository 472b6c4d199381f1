"""A part of the matrix of faults, in a file of its own that a worker imports quickly."""

from __future__ import annotations

import os
import time
from pathlib import Path

from flexgen_helm.runs.fault_matrix.outcomes import Outcome


class Stubborn:
    """Its cases do what they are called."""

    def __init__(self, folder: Path) -> None:
        assert folder.is_dir()

    def run(self, case: str) -> list[Outcome]:
        match case:
            case "hangs":
                time.sleep(600)
            case "dies":
                os._exit(3)
            case "fails":
                raise KeyError("of ours")
        return [Outcome(case, "answered")]
