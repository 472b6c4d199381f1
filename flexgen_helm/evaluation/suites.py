"""Suites: folders that hold run entries and, where wanted, a schema and data."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import dacite
from helm.benchmark.presentation.run_entry import RunEntries, RunEntry
from helm.common.general import parse_hocon

from flexgen_helm.errors import FlexGenError

RUN_ENTRIES = "run_entries.conf"


@dataclass(frozen=True)
class Suite:
    """A suite, as ``helm-run`` and ``helm-summarize`` must know it."""

    name: str
    """HELM's ``--suite``, the name of the folder of the results."""
    run_entries: Path
    """File in HELM's format."""
    packaged: bool
    """Whether it comes with this package, which then brings its data too."""

    @property
    def schema(self) -> Path | None:
        """HELM schema beside the run entries, if there is one."""
        path = self.run_entries.parent / "schema.yaml"
        return path if path.is_file() else None

    @property
    def description(self) -> str:
        """First line of comment of its file; empty if that does not begin with one."""
        first = self.run_entries.read_text(encoding="utf-8").lstrip().partition("\n")[0]
        return first.lstrip("# ").rstrip() if first.startswith("#") else ""

    @property
    def entries(self) -> list[str]:
        """Its run entries; HELM makes several runs of some."""
        return [entry.description for entry in _read_entries(self.run_entries)]

    @property
    def num_entries(self) -> int:
        """How many run entries it has."""
        return len(self.entries)

    @property
    def data(self) -> Path:
        """Folder beside the run entries, laid out like ``scenarios`` in HELM's output; most suites have none."""
        return self.run_entries.parent / "scenarios"


def packaged_suites() -> dict[str, Suite]:
    """Return the suites of this package by name."""
    runs = Path(str(resources.files("flexgen_helm.runs")))
    files = sorted(runs.glob(f"*/{RUN_ENTRIES}"))
    return {file.parent.name: Suite(file.parent.name, file, packaged=True) for file in files}


def find_suite(name_or_path: str) -> Suite:
    """Return a suite.

    Args:
        name_or_path: Name of a suite of this package, path of a file of run entries, or path of a folder that holds
            ``run_entries.conf``.

    Raises:
        FlexGenError: There is no such suite, or its run entries or its schema cannot be read.
    """
    packaged = packaged_suites()
    suite = packaged.get(name_or_path) or _at(Path(os.path.expanduser(name_or_path)).absolute(), packaged)
    if not suite.run_entries.is_file():
        raise FlexGenError(
            f"There is no suite `{name_or_path}`: it is neither a file of run entries nor a folder with a {RUN_ENTRIES}, "
            f"and the suites that come with this package are {', '.join(packaged)}."
        )
    _check_entries(suite.run_entries)
    if suite.schema:
        from flexgen_helm.reports.schema import read_environments  # with which pandas comes

        read_environments(suite.schema)
    return suite


def _at(path: Path, packaged: dict[str, Suite]) -> Suite:
    file = path / RUN_ENTRIES if path.is_dir() else path
    name = file.parent.name if file.name == RUN_ENTRIES else file.stem
    ours = {suite.run_entries.resolve() for suite in packaged.values()}
    return Suite(name, file, packaged=file.resolve() in ours)


def _read_entries(file: Path) -> list[RunEntry]:
    """Read run entries without the line that HELM's own reader prints."""
    entries: list[RunEntry] = dacite.from_dict(RunEntries, parse_hocon(file.read_text(encoding="utf-8"))).entries
    return entries


def _check_entries(file: Path) -> None:
    example = 'entries: [{description: "mmlu:subject=anatomy,model=text", priority: 1}]'
    try:
        entries = _read_entries(file)
    except Exception as error:
        # Parsers of several libraries read it, each with errors of its own.
        raise FlexGenError(f"{file} cannot be read as run entries ({error}). Write for example {example}.") from error
    if not entries:
        raise FlexGenError(f"{file} has no run entries, so there is nothing to run. Write for example {example}.")
    for entry in entries:
        _check_entry(file, entry.description)


def _check_entry(file: Path, description: str) -> None:
    """Find what HELM's parser would meet with a traceback, or take for a name."""
    name, colon, arguments = description.partition(":")
    faulty = [part for part in arguments.split(",") if "=" not in part] if colon else []
    if not faulty and not set(name) & set(",="):
        return
    lines = file.read_text(encoding="utf-8").splitlines()
    where = next((f"line {number} of {file}" for number, line in enumerate(lines, 1) if description in line), str(file))
    if faulty:
        raise FlexGenError(
            f"The run entry `{description}` in {where} has `{faulty[0]}` where `name=value` is expected. Write arguments as "
            "`scenario:name=value,name=value`, without spaces around commas."
        )
    forgotten = re.fullmatch(r"\s*(\w+)\s*[,; ]\s*(\w+=.*)", description)
    correct = f"`{forgotten[1]}:{forgotten[2]}`" if forgotten else "`scenario:name=value,name=value`"
    raise FlexGenError(f"The run entry `{description}` in {where} has no colon behind the scenario's name. Write {correct}.")
