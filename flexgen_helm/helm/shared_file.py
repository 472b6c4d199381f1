"""Files of which several processes each change a part."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from flexgen_helm.cache_folder import locked


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Replace a file by what ``change`` makes of its text, with no other process doing so in between.

    Whoever reads meanwhile finds the whole old or the whole new text, also after a kill.

    Args:
        path: The file; it and its folder are made if there are none.
        change: Gets the text, empty where there was no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
