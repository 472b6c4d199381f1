"""From the name of a compressed variant to the numerics of its engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexgen_helm import Engine
from flexgen_helm.compression.config import CompressionConfig
from flexgen_helm.errors import CompressionError
from tests.workbench import POLICY, Workbench

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "name": ("@w4", {}),
    "other spelling": ("", {"compression": "w4kv16"}),
    "keyword": ("", {"compression": "w4"}),
    "configuration": ("", {"compression": CompressionConfig(bits=4.5)}),
    "both": ("@w4", {"compression": "w4"}),
}


def load(folder: Path, suffix: str = "", **options: Any) -> Engine:
    return Engine.from_pretrained(f"{folder}{suffix}", dtype="float32", device="cpu", policy=POLICY, **options)


@pytest.mark.parametrize("way", WAYS)
def test_the_variant_is_part_of_the_numerics(way: str, bench: Workbench) -> None:
    """Of everything by which answers and slabs are found, so that no variant gets those of another."""
    suffix, options = WAYS[way]
    with load(bench.folder("llama"), suffix, **options) as engine, load(bench.folder("llama")) as plain:
        assert (engine.numerics.weights.scheme, plain.numerics.weights.scheme) == ("w4", "plain")
        assert engine.numerics.weights.digest == plain.numerics.weights.digest
        assert engine._parts.folder != plain._parts.folder


def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for suffix, compression in (("@w5", None), ("", "kv5"), ("@w4", "w8")):
        with pytest.raises(CompressionError):
            Engine.from_pretrained(f"{tmp_path}/nothing{suffix}", compression=compression)


def test_an_existing_folder_of_the_full_name_is_loaded_as_it_is(
    bench: Workbench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model@w4").symlink_to(bench.folder("llama"))
    with caplog.at_level("INFO", logger="flexgen_helm.compression"), load(tmp_path / "model@w4") as engine:
        assert engine.numerics.weights.scheme == "plain"
    assert len(caplog.records) == 1
