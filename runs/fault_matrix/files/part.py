"""Damaged files: each is refused by name, made again, of another model by its digest, or its answers are still right."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.registry import ENGINES
from flexgen_helm.runs.fault_matrix.commands import whole_suite
from flexgen_helm.runs.fault_matrix.files.damage import DAMAGES, remove
from flexgen_helm.runs.fault_matrix.files.subjects import Answers, Engines, Records, Subject
from flexgen_helm.runs.fault_matrix.files.written import Baseline, Suite
from flexgen_helm.runs.fault_matrix.notes import use_own_notes
from flexgen_helm.runs.fault_matrix.outcomes import Outcome
from flexgen_helm.runs.fault_matrix.tiny_model import tiny_model
from flexgen_helm.types import Policy

ON_DISK = (0.0, 0.0, 1.0)
ROWS: dict[str, Any] = {"gpu_batch_size": 16, "gpu_batch_tokens": 64}


def _subjects(folder: Path) -> dict[str, Subject]:
    model = tiny_model(folder / "model")
    suite = whole_suite(model, folder / "suite")
    slabs = Policy(**ROWS, weights=ON_DISK)
    w4 = {"compression": "w4", "policy": Policy(**ROWS)}
    made = ("offload/*.slab", "offload/*.json")
    return {
        "journal": Answers(model, "journal"),
        "cache": Answers(model, "cache"),
        "records": Records(model),
        "slabs": Engines(model, made, mends=True, policy=slabs),
        "compressed_slabs": Engines(model, made, mends=True, **w4),
        "decisions": Engines(model, ("offload/fit/*.safetensors", "offload/fit/*.json"), mends=True, **w4),
        "statistics": Engines(model, ("offload/fit/statistics/*",), mends=True, without=("offload/fit/*.*", *made), **w4),
        "config": Engines(model, ("model/*config.json", "model/*.index.json"), mends=False),
        "tokenizer": Engines(model, ("model/tokenizer*.json", "model/chat_template.jinja"), mends=False),
        "shards": Engines(model, ("model/*.safetensors",), mends=False),
        "suite": Suite(suite),
        "baseline": Baseline(suite),
    }


class FilesPart:
    """See `flexgen_helm.runs.fault_matrix.worker.Part`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        use_own_notes(folder)
        self._subjects = _subjects(folder)
        self._made: set[str] = set()

    def run(self, case: str) -> list[Outcome]:
        """Damage a file of a subject and let it be read."""
        name, number = case.split()
        generator = random.Random(f"files {number}")
        subject, folder = self._subjects[name], self._fresh(name)
        path = generator.choice(subject.files(folder))
        kind = generator.choice(list(DAMAGES))
        damaged = f"{path.relative_to(folder)} {kind}"
        DAMAGES[kind](path, generator)
        fault = name.replace("_", " ")
        try:
            verdict, note = subject.read(folder)
        except FlexGenError as error:
            return [self._refused(subject, folder, path, Outcome(fault, "refused", note=f"{damaged}: {error}"))]
        finally:
            if name == "records":
                ENGINES.close()
        return [Outcome(fault, verdict, note=f"{case}: {damaged}: {note}" if note else "")]

    def _refused(self, subject: Subject, folder: Path, path: Path, refused: Outcome) -> Outcome:
        """Check that a refusal names the file or a folder that holds it, and that what is made again may be deleted."""
        names = (str(path), str(path.parent), str(path.parent.parent), path.name)
        if not any(name in refused.note.partition(": ")[2] for name in names):
            return Outcome(refused.fault, "wrong", note=f"the file is not named: {refused.note}")
        if subject.mends:
            remove(path)
            try:
                verdict, note = subject.read(folder)
            except FlexGenError as error:
                return Outcome(refused.fault, "lost", note=f"{refused.note}; without the file: {error}")
            if verdict not in ("answered", "recomputed"):
                return Outcome(refused.fault, "wrong", note=f"{refused.note}; without the file: {verdict} {note}")
        return Outcome(refused.fault, "refused")

    def _fresh(self, name: str) -> Path:
        """Return a folder with whole files."""
        whole, folder = self._folder / "subjects" / name / "pristine", self._folder / "subjects" / name / "case"
        if name not in self._made:
            shutil.rmtree(whole.parent, ignore_errors=True)
            whole.mkdir(parents=True)
            self._subjects[name].make(whole)
            self._made.add(name)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        return folder
