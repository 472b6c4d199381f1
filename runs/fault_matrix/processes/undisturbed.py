"""What the parts that disturb commands compare with: a suite that nothing disturbed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_helm.runs.fault_matrix.commands import tiers, whole_suite
from flexgen_helm.runs.fault_matrix.tiny_model import tiny_model
from flexgen_helm.runs.kill_test.files import read_suite


@dataclass(frozen=True)
class Undisturbed:
    """A model, and a suite of it that nothing disturbed."""

    model: Path
    folder: Path
    """Everything that the suite's command wrote, with its slabs."""
    expected: Any
    """HELM's files, see `read_suite`."""

    @classmethod
    def made_in(cls, folder: Path) -> Undisturbed:
        """Make model and suite, unless they are there."""
        model, whole = tiny_model(folder / "model"), folder / "whole"
        return cls(model, whole, read_suite(whole_suite(model, whole, tiers(whole / "offload"))))
