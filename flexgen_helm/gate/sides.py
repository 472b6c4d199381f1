"""From what a user names to the answers of one configuration: runs of HELM, a baseline file, or samples of lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Literal

from flexgen_helm.errors import FlexGenError
from flexgen_helm.gate.baseline import read_baseline
from flexgen_helm.gate.config import LmEvalChoice
from flexgen_helm.gate.evidence import digested
from flexgen_helm.gate.lm_eval import read_samples, sample_files
from flexgen_helm.reports.answers import Answers, read_answers
from flexgen_helm.reports.comparing import Choices, read_metrics
from flexgen_helm.reports.naming import records, short_names
from flexgen_helm.reports.selection import Selection, select, select_one

Kind = Literal["runs", "file", "lm-eval"]


@dataclass(frozen=True)
class Side:
    """A configuration that was found, and not read yet."""

    name: str
    kind: Kind
    place: tuple[str, str]
    """By which the same is told: file or suite folder, and deployment."""
    read: Callable[[], Answers]
    """Reads it; `flexgen_helm.gate.evidence.digested`."""


@dataclass(frozen=True)
class Finder:
    """Finds configurations."""

    choices: Choices
    lm_eval: LmEvalChoice

    def one(self, text: str) -> Side:
        """Return the one configuration that a user names as baseline.

        Raises:
            FlexGenError: There is none, or there are several; `CorruptFile` where it cannot be read.
        """
        return self._file(text) or self._runs([select_one(text, self.choices.output_path)])[0]

    def several(self, texts: Sequence[str], baseline: Side) -> list[Side]:
        """Return all candidates that a user names; a suite without a model stands for all but the baseline.

        Raises:
            FlexGenError: As `one`; or one is given twice, or none is left.
        """
        found: list[Side] = []
        for text in texts:
            file = self._file(text)
            sides = [file] if file else self._runs(select(text, self.choices.output_path))
            others = [side for side in sides if side.place != baseline.place]
            found += others or (sides if len(sides) == 1 else [])
        if not found:
            raise FlexGenError("There is no candidate. Give --candidates SUITE:MODEL, or a suite with other models in it.")
        places = [side.place for side in found]
        if twice := next((place for place in places if places.count(place) > 1), None):
            raise FlexGenError(f"The candidate {' '.join(filter(None, twice))} is given twice. Give it once.")
        return _distinct(found)

    def _file(self, text: str) -> Side | None:
        path = Path(text).expanduser()
        place = (str(path.resolve()), "")
        if path.is_file() and path.suffix != ".jsonl":
            return Side(path.stem, "file", place, lambda: read_baseline(path))
        if sample_files(path):
            folder = path if path.is_dir() else path.parent
            return Side(folder.resolve().name, "lm-eval", place, lambda: digested(read_samples(path, self.lm_eval)))
        return None

    def _runs(self, selections: Sequence[Selection]) -> list[Side]:
        engines = [next(iter(records(each)), None) for each in selections]
        names = short_names(selections, engines)
        return [self._of_runs(selection, name) for selection, name in zip(selections, names, strict=True)]

    def _of_runs(self, selection: Selection, name: str) -> Side:
        def read() -> Answers:
            given = self.choices.schema
            metrics = read_metrics(given or selection.suite / "schema.json", required=given is not None)
            return digested(read_answers(selection, metrics, name=name))

        return Side(name, "runs", (str(selection.suite.resolve()), selection.deployment), read)


def _distinct(sides: Sequence[Side]) -> list[Side]:
    """Give each candidate a name of its own."""
    named: list[Side] = []
    for side in sides:
        taken = {each.name for each in named}
        names = (f"{side.name} ({number})" if number > 1 else side.name for number in count(1))
        named.append(replace(side, name=next(name for name in names if name not in taken)))
    return named
