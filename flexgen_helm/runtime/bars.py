"""Bars of tqdm: a line of a terminal, or in a notebook a widget where ipywidgets are installed and a line elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm


def is_notebooks(stream: object) -> bool:
    """Return whether a stream is one of a notebook, on which a bar can be drawn though it is no terminal."""
    return type(stream).__module__ == "ipykernel.iostream"


def make_bar(
    items: Iterable[Any] | None = None, *, stream: TextIO | None, disable: bool | None = None, **options: Any
) -> tqdm[Any]:
    """Return a bar.

    Args:
        items: What it iterates over, if anything.
        stream: Where it is drawn; None: standard error.
        disable: Whether it is not shown; None: it is on a terminal and in a notebook.
        options: Other keywords of ``tqdm``.
    """
    stream = sys.stderr if stream is None else stream
    kind: type[tqdm[Any]] = tqdm
    if disable is None and is_notebooks(stream):
        from tqdm import notebook

        disable = False
        if getattr(notebook, "IProgress", None) is not None:  # without ipywidgets it would warn and fail
            kind = notebook.tqdm
    return kind(items, file=stream, disable=disable, leave=False, **options)
