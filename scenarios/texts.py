"""Texts out of plain files, files of rows and data sets of the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_helm.errors import ScenarioError

ROW_FORMATS = (".json", ".jsonl", ".csv", ".parquet")
"""Suffixes of files of rows."""
_FETCH = "`python -m flexgen_helm.assets --output-path <HELM's output path>` fetches the data that come with this package"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A place of texts: a file, a folder, or a data set on the hub.

    Raises:
        ScenarioError: A field is empty or no text. HELM turns what looks like a number in a run entry into one.
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
            if value == "":
                raise ScenarioError(f"`{name}=` is empty, so it names nothing. Write a value behind it, or leave it out.")
            if value is not None and not isinstance(value, str):
                raise ScenarioError(
                    f"HELM reads `{name}={value}` as a number, so its spelling is lost. Write a path as `./{value}`; for "
                    "another argument, export the rows to a file and name that."
                )


def read_texts(source: Source, folder: Path) -> list[str]:
    """Read the texts of a source but those that are empty or white space, in its order; a folder's by its files' paths.

    Args:
        source: The texts to read. Relative paths are looked up in the working directory, then in ``folder``.
        folder: Folder of the scenario, ``<output path>/scenarios/<name>``.

    Raises:
        ScenarioError: There is no such source, it cannot be read as text, or all of its texts are blank.
    """
    texts = [text for text in _read_all(source, folder) if text.strip()]
    if not texts:
        raise ScenarioError(f"`{source.path}` holds no text, so there is nothing to predict. Name another source.")
    return texts


def _read_all(source: Source, folder: Path) -> list[str]:
    # Unlike `Path.expanduser`, this leaves the name of an unknown user as it is.
    for path in (Path(os.path.expanduser(source.path)), folder / source.path):
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
        return [path.read_bytes().decode("utf-8-sig")]
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(
            f"`{path}` cannot be read as UTF-8 text: {error}. Convert it, or name a file of rows by its suffix "
            f"({', '.join(ROW_FORMATS)})."
        ) from error


def _read_rows(path: Path, source: Source) -> list[str]:
    if not path.stat().st_size:
        raise ScenarioError(f"`{path}` is empty. Download or export it again.")
    try:
        rows = _load_rows(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise ScenarioError(f"`{path}` cannot be read: {_reason(error)} Check that the file is whole.") from error
    return _column(rows, list(rows), source, str(path)) if rows else []


def _load_rows(path: Path) -> Mapping[str, list[Any]]:
    """Return the columns of a file; texts are as they are written, also those that look like a date or a number."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
        return columns
    if path.suffix == ".csv":
        import pandas as pd

        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        if not isinstance(frame.index, pd.RangeIndex):
            raise ValueError("rows have more fields than the header (a text with a comma needs quotes)")
        return {str(name): list(frame[name]) for name in frame.columns}
    content = path.read_bytes().decode("utf-8-sig")
    is_list = content.lstrip().startswith("[")
    rows = json.loads(content) if is_list else [json.loads(line) for line in content.split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a row is no JSON object")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _read_hub(source: Source) -> list[str]:
    import datasets

    try:
        rows = datasets.load_dataset(source.path, source.config, split=source.split or "test")
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise ScenarioError(
            f"`{source.path}` is no local path, and as a data set of the hub it cannot be loaded: {_reason(error)} "
            f"Check name, config and split; without a network, name local files ({_FETCH})."
        ) from error
    return _column(rows, rows.column_names, source, f"{source.path} on the hub")


def _column(rows: Any, names: list[str], source: Source, where: str) -> list[str]:
    name = source.field or "text"
    if name not in names:
        raise ScenarioError(f"`{where}` has no column `{name}`, but {names}. Write field=<column>.")
    texts: list[str] = list(rows[name])
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ScenarioError(f"Row {number} of `{where}` holds {text!r} in the column `{name}`, which is no text.")
    return texts


def _reason(error: Exception) -> str:
    # The library wraps the error of a parser into one that says nothing.
    lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."
