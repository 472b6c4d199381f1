"""Texts out of plain files, files of rows and data sets of the hub."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_helm.errors import ScenarioError

ROW_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""Suffixes of files of rows, and the loader of ``datasets`` for each."""
_FETCH = "`python -m flexgen_helm.assets --output-path <HELM's output path>` fetches the data that come with this package"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """Where texts come from.

    Raises:
        ScenarioError: A field is no text. HELM turns what looks like a number in a run entry into one.
    """

    path: str
    """A text file, a file of rows, a folder of such files, or the name of a data set on the hub."""
    config: str | None = None
    """Configuration of a data set on the hub."""
    split: str | None = None
    """Split of a data set on the hub, with slices as in ``test[:10]``; ``test`` where it is not given."""
    field: str | None = None
    """Column of the rows that holds the text; ``text`` where it is not given."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, str):
                raise ScenarioError(
                    f"HELM reads `{name}={value}` as a number, so its spelling is lost. Write a path as `./{value}`; for "
                    "another argument, export the rows to a file and name that."
                )


def read_texts(source: Source, folder: Path) -> list[str]:
    """Read all texts of a source, in its order; those of a folder in the order of its files' paths.

    Args:
        source: What to read. Relative paths are looked up in the working directory, then in ``folder``.
        folder: Of the scenario, ``<output path>/scenarios/<name>``.

    Raises:
        ScenarioError: There is no such source, or it cannot be read as text.
    """
    for path in (Path(source.path).expanduser(), folder / source.path):
        if path.exists():
            return _read_local(path, source)
    if not _HUB_NAME.fullmatch(source.path) or Path(source.path).suffix in (".txt", *ROW_FORMATS):
        raise ScenarioError(f"`{source.path}` is no file or folder in {Path.cwd()} or {folder}. Correct the path; {_FETCH}.")
    return _read_hub(source)


def _read_local(path: Path, source: Source) -> list[str]:
    if source.config or source.split:
        raise ScenarioError(f"`{path}` is local, so it has neither config nor split. Remove them, or name one file of it.")
    if not path.is_dir():
        return _read_file(path, source)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
    if not files:
        raise ScenarioError(f"The folder `{path}` holds no files. Name one that does.")
    return [text for file in files for text in _read_file(file, source)]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_file(path: Path, source: Source) -> list[str]:
    if path.suffix in ROW_FORMATS:
        return _read_rows(path, source)
    try:
        return [path.read_bytes().decode("utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(
            f"`{path}` cannot be read as UTF-8 text: {error}. Convert it, or name a file of rows by its suffix "
            f"({', '.join(ROW_FORMATS)})."
        ) from error


def _read_rows(path: Path, source: Source) -> list[str]:
    if not path.stat().st_size:
        raise ScenarioError(f"`{path}` is empty. Download or export it again.")
    import datasets

    # What the library keeps of a file is of no use later: it is parsed again, so that no change is missed.
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = datasets.load_dataset(
                ROW_FORMATS[path.suffix], data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            raise ScenarioError(f"`{path}` cannot be read: {_reason(error)} Check that the file is whole.") from error
        return _column(rows, source, str(path))


def _read_hub(source: Source) -> list[str]:
    import datasets

    try:
        rows = datasets.load_dataset(source.path, source.config, split=source.split or "test")
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise ScenarioError(
            f"`{source.path}` is no local path, and as a data set of the hub it cannot be loaded: {_reason(error)} "
            f"Check name, config and split; without a network, name local files ({_FETCH})."
        ) from error
    return _column(rows, source, f"{source.path} on the hub")


def _column(rows: Any, source: Source, where: str) -> list[str]:
    name = source.field or "text"
    if name not in rows.column_names:
        raise ScenarioError(f"`{where}` has no column `{name}`, but {rows.column_names}. Write field=<column>.")
    texts: list[str] = list(rows[name])
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ScenarioError(f"Row {number} of `{where}` holds {text!r} in the column `{name}`, which is no text.")
    return texts


def _reason(error: Exception) -> str:
    # The library wraps the error of a parser into one that says nothing.
    lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."
