"""The only reader of the files that HELM and this package write into run and suite folders.

Files are read when a method asks for them and are not kept, because those of a large suite do not fit into memory together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from flexgen_helm.errors import CorruptFile
from flexgen_helm.helm.pausing import LAST_FILE
from flexgen_helm.helm.run_record import RUN_FILE, WORKLOAD_FILE
from flexgen_helm.reports.contents import (
    InstanceStats,
    Request,
    Stat,
    Workload,
    parse_instance_stats,
    parse_list,
    parse_record,
    parse_request,
    parse_spec,
    parse_stat,
    parse_workload,
)

T = TypeVar("T")
SPEC_FILE, REQUESTS_FILE, STATS_FILE = "run_spec.json", "scenario_state.json", "stats.json"
HELM_FILES = (SPEC_FILE, "scenario.json", REQUESTS_FILE, STATS_FILE, LAST_FILE)
"""HELM's files of a run, in the order in which HELM writes them."""


def without_model(run: str) -> str:
    """Return the name of a run without its model."""
    return re.sub("[,:]model(_deployment)?=[^,]*", "", run)


Version = tuple[int, int, int, int]
"""Inode, size and times of a file."""


@dataclass(frozen=True)
class Run:
    """The folder of a run. Every method raises `CorruptFile` where a file is missing, torn, or not what HELM writes."""

    folder: Path

    @property
    def name(self) -> str:
        """The run entry with its model, as HELM names the folder."""
        return self.folder.name

    @property
    def scenario(self) -> str:
        """The run entry without its model, which is the same for every model."""
        return without_model(self.name)

    @property
    def is_complete(self) -> bool:
        """Whether the last of HELM's files is there."""
        return (self.folder / LAST_FILE).is_file()

    @property
    def version(self) -> Version:
        """Tells the last of HELM's files from one that is written in its place. The run must be complete."""
        status = (self.folder / LAST_FILE).stat()
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    @cached_property
    def spec(self) -> dict[str, Any]:
        """HELM's run spec: ``groups``, ``adapter_spec``, ``scenario_spec`` and more."""
        return _parsed(self.folder / SPEC_FILE, parse_spec)

    @property
    def deployment(self) -> str:
        """Name of the model deployment."""
        return str(self.spec["adapter_spec"]["model_deployment"])

    def requests(self) -> list[Request]:
        """Read all requests in HELM's order."""
        return _parsed(self.folder / REQUESTS_FILE, lambda content: parse_list(content["request_states"], parse_request))

    def stats(self) -> list[Stat]:
        """Read the metrics of the run."""
        return _parsed(self.folder / STATS_FILE, lambda content: parse_list(content, parse_stat))

    def instance_stats(self) -> list[InstanceStats]:
        """Read the metrics of each instance."""
        return _parsed(self.folder / LAST_FILE, lambda content: parse_list(content, parse_instance_stats))

    @property
    def record_path(self) -> Path:
        """File in which this package recorded model, engine and speed; runs of other clients have none."""
        return self.folder / RUN_FILE

    def record(self) -> dict[str, Any] | None:
        """Read what this package recorded of model, engine and speed; None for a run of another client."""
        return _parsed(self.record_path, parse_record) if self.record_path.exists() else None

    def documents(self) -> dict[str, Any]:
        """Read HELM's files as plain JSON, by file name; files that do not exist are left out."""
        return {name: _read(self.folder / name) for name in HELM_FILES if (self.folder / name).exists()}


def list_runs(suite: Path) -> list[Run]:
    """Return the runs of a suite folder by name, complete or not; none if the folder does not exist."""
    return [Run(path.parent) for path in sorted(suite.glob(f"*/{SPEC_FILE}"))]


def only_run(suite: Path) -> Run:
    """Return the run of a suite folder that holds one.

    Raises:
        CorruptFile: The folder holds none, or several.
    """
    runs = list_runs(suite)
    if len(runs) != 1:
        raise CorruptFile(
            f"{suite} holds {len(runs)} runs of HELM where one is expected. Name a folder that helm-run wrote anew."
        )
    return runs[0]


def read_workloads(suite: Path) -> list[Workload]:
    """Read what this package recorded of a suite; nothing if the suite was served by other clients alone.

    Raises:
        CorruptFile: The file is torn, or not what this package writes.
    """
    path = suite / WORKLOAD_FILE
    return _parsed(path, lambda content: parse_list(content, parse_workload)) if path.exists() else []


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "is missing: the run did not end, or its folder was copied in part"
        raise CorruptFile(f"{path} {what}. {_advice(path)}") from error
    except OSError as error:
        raise CorruptFile(f"{path} cannot be read ({error.strerror}). {_advice(path)}") from error
    except (ValueError, RecursionError) as error:
        what = f"is not whole: it does not parse as JSON ({error})"
        raise CorruptFile(f"{path} {what}. {_advice(path)}") from error


def _parsed(path: Path, parse: Callable[[Any], T]) -> T:
    content = _read(path)
    try:
        return parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        writer = "this package" if path.name in (RUN_FILE, WORKLOAD_FILE) else "HELM"
        what = f"is not what {writer} writes under this name ({type(error).__name__}: {error})"
        raise CorruptFile(f"{path} {what}. {_advice(path)}") from error


def _advice(path: Path) -> str:
    if path.name in (RUN_FILE, WORKLOAD_FILE):
        return "Remove the file, which holds no answers, or run helm-run again."
    return "Run the same helm-run command again, copy the whole folder again, or leave this run out."
