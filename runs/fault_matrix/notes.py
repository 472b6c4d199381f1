"""What this package keeps of earlier engines, in a folder of a part's own: it is damaged, or gets other times."""

from __future__ import annotations

import os
from pathlib import Path

from flexgen_helm.cache_folder import cache_folder


def use_own_notes(folder: Path) -> None:
    """Let this process and those that it starts keep notes in a part's folder; only machine code is that of the user."""
    compiled, notes = cache_folder() / "compiled", folder / "notes"
    compiled.mkdir(parents=True, exist_ok=True)
    notes.mkdir(parents=True, exist_ok=True)
    if not (notes / "compiled").exists():
        (notes / "compiled").symlink_to(compiled)
    os.environ["FLEXGEN_HELM_CACHE"] = str(notes)
