"""CSV files that a spreadsheet opens without running anything."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

BEGINS = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What makes a spreadsheet take a text for a formula (OWASP, CSV injection); full-width forms too."""
WIDE = ("\uff1d", "\uff0b", "\uff0d", "\uff20")


def without_formula(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula: with an apostrophe before what begins like one."""
    return f"'{text}" if text.lstrip(" ").startswith((*BEGINS, *WIDE)) or text.startswith((*BEGINS, "'")) else text


def write_csv(file: Path, frame: pd.DataFrame) -> None:
    """Write a frame without its index. Missing numbers are empty cells.

    Raises:
        OSError: If it cannot be written.
    """
    safe = frame.copy(deep=False)
    for name in safe.columns:
        if safe[name].dtype == object or isinstance(safe[name].dtype, pd.CategoricalDtype):
            safe[name] = [without_formula(value) if isinstance(value, str) else value for value in safe[name]]
    safe.to_csv(file, index=False, lineterminator="\n", errors="replace")
