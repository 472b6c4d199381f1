"""From what a user writes, ``SUITE[:MODEL]``, to the runs of one deployment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.reports.runs import Run, list_runs


@dataclass(frozen=True)
class Selection:
    """All runs of one deployment in one suite folder, complete."""

    suite: Path
    deployment: str
    runs: Mapping[str, Run]
    """By run entry without the model; at least one."""


def select(text: str, output_path: Path) -> list[Selection]:
    """Return the deployments that a user names.

    Args:
        text: A suite folder, or the name of a suite under ``<output_path>/runs``; behind it, after a colon, a deployment: its
            whole name, or the end of it from a ``/`` or ``@`` on. Without it: all deployments of the suite.
        output_path: HELM's output path.

    Raises:
        FlexGenError: There is no such suite or deployment, or the name is that of several deployments.
        CorruptFile: A run did not end, or two runs of a deployment have one name.
    """
    suite, model = _split(text, output_path)
    found: dict[str, list[Run]] = {}
    for run in list_runs(suite):
        found.setdefault(run.deployment, []).append(run)
    if not found:
        raise FlexGenError(f"The folder {suite} holds no runs of HELM. Name a suite, such as benchmark_output/runs/v1.")
    names = sorted(found) if model is None else [_named(model, suite, sorted(found))]
    return [Selection(suite, name, _checked(suite, name, found[name])) for name in names]


def select_one(text: str, output_path: Path) -> Selection:
    """Return the one deployment that a user names; see `select`.

    Raises:
        FlexGenError: The suite holds several, and none is named. Else as `select`.
    """
    selections = select(text, output_path)
    if len(selections) > 1:
        listed = ", ".join(f"`{each.deployment}`" for each in selections)
        raise FlexGenError(
            f"The suite {selections[0].suite} holds runs of several models, and `{text}` names none: {listed}. "
            f"Write one behind a colon, such as {text}:{selections[0].deployment}."
        )
    return selections[0]


def _split(text: str, output_path: Path) -> tuple[Path, str | None]:
    """Split at the first colon before which there is a folder."""
    ends = [len(text), *(match.start() for match in re.finditer(":", text))]
    for end in ends:
        for folder in (Path(text[:end]).expanduser(), output_path / "runs" / text[:end]):
            if text[:end] and folder.is_dir():
                return folder, text[end + 1 :] or None
    raise FlexGenError(
        f"There is no suite `{text}`: neither a folder nor a name under {output_path / 'runs'}. Give SUITE or SUITE:MODEL, "
        "or HELM's output folder with --output-path."
    )


def _named(model: str, suite: Path, names: Sequence[str]) -> str:
    exact = [name for name in names if name in (model, f"flexgen/{model}")]
    found = exact or [name for name in names if name.endswith(model) and (model[0] in "/@" or name[-len(model) - 1] == "/")]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"`{name}`" for name in found or names)
    problem = "is the end of several names" if found else "has no runs"
    raise FlexGenError(f"The model `{model}` {problem} in {suite}. Write one of {listed}.")


def _checked(suite: Path, deployment: str, runs: Sequence[Run]) -> dict[str, Run]:
    checked: dict[str, Run] = {}
    for run in runs:
        if not run.is_complete:
            raise CorruptFile(
                f"The run {run.folder} did not end: HELM has not written its last file. Run the same helm-run command again, "
                "or remove the folder."
            )
        if run.scenario in checked:
            raise CorruptFile(
                f"Two runs of `{deployment}` in {suite} have one name, `{run.scenario}`: {checked[run.scenario].name} and "
                f"{run.name}. Remove the folder of one of them."
            )
        checked[run.scenario] = run
    return checked
