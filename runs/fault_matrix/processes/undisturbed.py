"""What the parts that disturb commands compare with: a suite that nothing disturbed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flexgen_helm.runs.fault_matrix.commands import tiers, whole_suite
from flexgen_helm.runs.fault_matrix.tiny_model import tiny_model
from flexgen_helm.runs.kill_test.files import read_suite


def undisturbed(folder: Path) -> tuple[Path, Any]:
    """Return the folder of the model and what a suite of it holds that nothing disturbed; both are made if they are missing."""
    os.environ["FLEXGEN_HELM_CACHE"] = str(folder / "notes")
    model, whole = tiny_model(folder / "model"), folder / "whole"
    return model, read_suite(whole_suite(model, whole, tiers(whole / "offload")))
