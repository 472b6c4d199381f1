"""Compilation of loops by Numba, and the machine code that is kept of them.

Numba would keep it beside the source, where every new installation or checkout compiles anew, and until the loop's own file
changes, whatever happens to the functions that it calls. So it is kept in the cache folder, by the sources of all loops and of
what they import.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

import flexgen_helm
from flexgen_helm.cache_folder import cache_folder

size = np.uint64
"""Type of indices: Numba lets signed ones count from the end, which keeps loops from being vectorised."""


def compiled(function: Any) -> Any:
    """Compile at the first call without the GIL, and keep the machine code on disk where a folder can be written."""
    loop = njit(nogil=True)(function)
    with suppress(RuntimeError):  # no folder can be written
        loop._cache = _KeptCode(function)  # type: ignore[attr-defined]
    return loop


@cache
def _sources() -> str:
    """A digest of all files with loops that Numba compiles, and of those whose functions and constants they import."""
    root = Path(flexgen_helm.__file__).parent
    found = {path: path.read_bytes() for path in root.rglob("*.py")}
    loops = {path: content for path, content in found.items() if b"numba" in content.lower()}
    names = {name for content in loops.values() for name in re.findall(rb"^from flexgen_helm\.([\w.]+) import", content, re.M)}
    used = {root.joinpath(*name.decode().split(".")).with_suffix(".py") for name in names}
    digest = hashlib.sha256()
    for path in sorted(loops.keys() | (used & found.keys())):
        digest.update(f"{path.relative_to(root)}:".encode() + found[path])
    return digest.hexdigest()[:32]


class _InCacheFolder(_CacheLocator):
    """Finds the machine code of a loop in the cache folder."""

    def __init__(self, function: Any, file: Path) -> None:
        self._line, self._folder = function.__code__.co_firstlineno, cache_folder() / "compiled" / "loops" / _sources()
        self._folder /= file.parent.name

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _InCacheFolder | None:
        found = cls(py_func, Path(py_file))
        with suppress(OSError):
            found.ensure_cache_path()
            return found
        return None

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return ""  # the folder's name says it

    def get_disambiguator(self) -> str:
        return str(self._line)


class _ResultsInCacheFolder(CompileResultCacheImpl):
    _locator_classes = [_InCacheFolder, *CompileResultCacheImpl._locator_classes]  # noqa: RUF012  # as Numba has it


class _KeptCode(FunctionCache):
    _impl_class = _ResultsInCacheFolder

    @contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        """A disk that is full, or a folder that is gone, costs a compilation."""
        with suppress(OSError):
            yield
