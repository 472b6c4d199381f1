"""Compilation of loops by Numba, and the machine code that is kept of them.

Numba would keep it beside the source, where every new installation or checkout compiles anew, and until the loop's own file
changes, whatever happens to the functions that it calls. So it is kept in the cache folder, by the sources of what a loop is
made of.
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


IMPORT = re.compile(rb"^from (flexgen_helm[\w.]*) import", re.MULTILINE)


@cache
def _made_of(file: Path) -> frozenset[Path]:
    """A file with loops, or parts of them, and the files of this package whose functions and constants it imports."""
    content = file.read_bytes()
    if b"numba" not in content.lower():
        return frozenset([file])
    names = (name.decode().split(".")[1:] for name in IMPORT.findall(content))
    used = (Path(flexgen_helm.__file__).parent.joinpath(*name).with_suffix(".py") for name in names)
    return frozenset([file]).union(*(_made_of(each) for each in used if each.is_file()))


@cache
def _digest(file: Path) -> str:
    """A digest of everything that a file's loops are made of."""
    digest = hashlib.sha256()
    for path in sorted(_made_of(file)):
        digest.update(f"{path.name}:".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


class _InCacheFolder(_CacheLocator):
    """Finds the machine code of a loop in the cache folder."""

    def __init__(self, function: Any, file: Path) -> None:
        self._line, self._folder = function.__code__.co_firstlineno, cache_folder() / "compiled" / "loops" / _digest(file)

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
