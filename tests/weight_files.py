"""Sees which weight files are opened, by whom ever."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import safetensors

_watching: list[list[str]] = []


def _note_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watching and str(arguments[0]).endswith(".safetensors"):
        for opened in _watching:
            opened.append(str(arguments[0]))


# An audit hook sees every file that Python opens, whatever code asks for it. It cannot be removed again.
sys.addaudithook(_note_open)


@contextmanager
def opened_weight_files() -> Iterator[list[str]]:
    """Collects the paths of safetensors files that are opened in a block, by Python or by the library of the format."""
    opened: list[str] = []
    original = safetensors.safe_open

    def note(path: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(str(path))
        return original(path, *arguments, **options)

    _watching.append(opened)
    try:
        with mock.patch("safetensors.safe_open", note), mock.patch("transformers.modeling_utils.safe_open", note):
            yield opened
    finally:
        _watching.remove(opened)
