"""Short names of configurations, and whether two are the same model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, count
from typing import Protocol

from flexgen_helm.errors import FlexGenError
from flexgen_helm.reports.engine_record import EngineRecord, engine_record
from flexgen_helm.reports.selection import Selection


class OtherModel(FlexGenError):
    """A baseline that is another model than a candidate."""


def records(selection: Selection) -> list[EngineRecord]:
    """Return the records of all runs that have one."""
    found = [run.record() for run in selection.runs.values()]
    return [engine_record(record) for record in found if record is not None]


def short_names(selections: Sequence[Selection], engines: Sequence[EngineRecord | None]) -> list[str]:
    """Return a name for each configuration that no other has; the first is the baseline.

    A variant is called by itself, such as ``@w4``. Weights released with 16 bits are called ``16-bit``, whatever computes them.
    A model that another client served is called by its deployment. A name that is taken is made longer: by the dtype that
    computes, then the whole deployment, its suite, a number.
    """
    names: list[str] = []
    for selection, engine in zip(selections, engines, strict=True):
        short = _name(selection, engine)
        longer = [f"{short} in {engine.dtype}"] if engine is not None and not engine.variant else []
        choices = [short, *longer, selection.deployment, f"{selection.deployment} of {selection.suite}"]
        numbered = (f"{short} ({number})" for number in count(2))
        names.append(next(name for name in chain(choices, numbered) if name not in names))
    return names


def _name(selection: Selection, engine: EngineRecord | None) -> str:
    if engine is None:
        return selection.deployment
    if engine.variant:
        return f"@{engine.variant}"
    return "16-bit" if engine.is_half else engine.dtype or selection.deployment


class Deployed(Protocol):
    """Runs of one deployment, in whatever form."""

    @property
    def deployment(self) -> str:
        """Name of the deployment."""
        ...


def check_same_model(baseline: Deployed, candidate: Deployed, engines: tuple[EngineRecord | None, EngineRecord | None]) -> None:
    """Refuse another model, by the digest of the checkpoint where both sides have one, else by the last part of its name.

    Raises:
        OtherModel: The models differ.
    """
    before, after = engines
    if before is not None and after is not None and before.digest and after.digest:
        if before.digest == after.digest:
            return
        why = f"the checkpoints have the digests {before.digest} and {after.digest}"
    else:
        names = [_model(side, engine) for side, engine in ((baseline, before), (candidate, after))]
        if names[0].lower() == names[1].lower():
            return
        why = f"the names are {names[0]} and {names[1]}"
    raise OtherModel(
        f"`{baseline.deployment}` is another model than `{candidate.deployment}`: {why}. Choose a baseline of the same "
        "model, or compare different models with --other-models."
    )


def _model(selection: Deployed, engine: EngineRecord | None) -> str:
    """Return the last part of the model's name, without variant and options."""
    name = selection.deployment if engine is None or not engine.model else engine.model
    return name.rstrip("/").rpartition("/")[2].partition("@")[0].partition("+")[0].partition("#")[0]
