"""Texts out of every kind of source; the library is only ever given local paths."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from flexgen_helm.errors import ScenarioError
from flexgen_helm.scenarios import texts
from flexgen_helm.scenarios.texts import Source, read_texts

TEXTS = ['One, "two"\nthree\n', "caf\u00e9 \u2028 \U0001f389", " 007"]


def write_rows(path: Path, column: str = "text") -> None:
    """Writes the texts with other code than that which reads them."""
    table = pa.table({"number": [1, 2, 3], column: TEXTS})
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        path.write_text(json.dumps(table.to_pylist(), indent=1))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_rows_of_every_format(suffix: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"rows{suffix}")
    assert read_texts(Source(str(tmp_path / f"rows{suffix}")), tmp_path) == TEXTS
    write_rows(tmp_path / f"other{suffix}", "body")
    assert read_texts(Source(f"other{suffix}", field="body"), tmp_path) == TEXTS
    with pytest.raises(ScenarioError, match=r"no column `text`, but \['number', 'body'\].*field="):
        read_texts(Source(f"other{suffix}"), tmp_path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("values", [["2026-01-31", "2026-02-01"], ["NA", "None", "null"], ["007", "1e3"], ["True"]])
def test_texts_that_look_like_other_values_stay_texts(values: list[str], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    frame = pd.DataFrame({"text": values})
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=suffix == ".jsonl")
    assert read_texts(Source(str(path)), tmp_path) == values


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", "a"), ("a.csv", "text\na\n"), ("a.jsonl", '{"text": "a"}'), ("a.json", '[{"text": "a"}]')]
)
def test_byte_order_mark_is_no_text(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_texts(Source(name), tmp_path) == ["a"]


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ("one", "two"):
        path.write_text(json.dumps({"text": text}))
        assert read_texts(Source(str(path)), tmp_path) == [text]
    assert list(tmp_path.iterdir()) == [path]


def test_text_files_alone_and_in_folders(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "b" / ".git").mkdir(parents=True)
    (folder / "c.md").write_bytes("last\r\n\ufeff".encode())
    (folder / "b" / "z").write_text("second")
    (folder / "a.txt").write_text("first")
    (folder / "b" / ".git" / "config").write_text("hidden")
    (folder / ".hidden").write_text("hidden")
    write_rows(folder / "b" / "rows.jsonl")
    assert read_texts(Source(str(folder)), tmp_path) == ["first", *TEXTS, "second", "last\r\n\ufeff"]
    assert read_texts(Source("c.md"), folder) == ["last\r\n\ufeff"]


def test_working_directory_comes_before_the_scenarios_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("working", "scenario"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "both.txt").write_text(name)
    (tmp_path / "scenario" / "one.txt").write_text("one")
    monkeypatch.chdir(tmp_path / "working")
    assert read_texts(Source("both.txt"), tmp_path / "scenario") == ["working"]
    assert read_texts(Source("one.txt"), tmp_path / "scenario") == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", b"caf\xe9", r"UTF-8 text: .*position 3.*Convert it"),
        ("torn.jsonl", b'{"text": "a"}\n{"text": ', r"Expecting value.*file is whole"),
        ("torn.parquet", b"PAR1", r"Parquet.*file is whole"),
        ("empty.csv", b"", "is empty"),
        ("null.json", b'[{"text": "a"}, {"text": null}]', r"Row 1 .* holds None in the column `text`"),
        ("missing.jsonl", b'{"text": "a"}\n{"body": "b"}', r"Row 1 .* holds None in the column `text`"),
        ("numbers.jsonl", b'{"text": 1}', r"Row 0 .* holds 1 in the column `text`"),
        ("texts.json", b'["a", "b"]', r"a row is no JSON object"),
        ("commas.csv", b"text\nHello, you\n", r"more fields than the header"),
        ("blank.jsonl", b" \n\n", r"holds no text"),
        ("blank.txt", b"\xef\xbb\xbf \n", r"holds no text"),
        ("header.csv", b"text\n", r"holds no text"),
    ],
)
def test_broken_files_are_named_with_the_reason(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ScenarioError, match=rf"(?s){name}.*{message}|{message}"):
        read_texts(Source(name), tmp_path)


@pytest.mark.parametrize("path", ["none.txt", "/none/data", "../none", "a b/c", "none.parquet", "~nouser/x"])
def test_missing_paths_are_not_asked_of_the_hub(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_read_hub", None)
    with pytest.raises(ScenarioError, match=rf"`{path}` is no file or folder.*flexgen_helm\.assets"):
        read_texts(Source(path), tmp_path)


def test_empty_folder_and_splits_of_local_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="holds no files"):
        read_texts(Source(str(tmp_path)), tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ScenarioError, match="neither config nor split"):
        read_texts(Source("a.txt", split="test"), tmp_path)


@pytest.mark.parametrize("name", ["path", "config", "split", "field"])
def test_empty_arguments_are_refused(name: str) -> None:
    with pytest.raises(ScenarioError, match=f"`{name}=` is empty"):
        Source(**{"path": "a.txt", name: ""})


@pytest.mark.parametrize(("name", "value"), [("path", 2026), ("config", 1.5)])
def test_numbers_are_refused(name: str, value: float) -> None:
    with pytest.raises(ScenarioError, match=f"reads `{name}={value}` as a number"):
        Source(**{"path": "a.txt", name: value})


def test_hub_data_sets_by_config_split_and_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a folder for a data set of the hub; ours asks it only where there is no such path."""
    copy = tmp_path / "copy"
    for config, split in (("en", "test"), ("en", "validation"), ("de", "test")):
        (copy / config).mkdir(parents=True, exist_ok=True)
        (copy / config / f"{split}.jsonl").write_text(json.dumps({"text": f"{config} {split}", "body": "b"}))
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("en", "de"))
    (copy / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    load, cache = datasets.load_dataset, str(tmp_path / "cache")
    folders = {"org/set": str(copy)}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *a, **k: load(folders[path], *a, **k, cache_dir=cache))
    assert read_texts(Source("org/set", "en"), tmp_path) == ["en test"]
    assert read_texts(Source("org/set", "de"), tmp_path) == ["de test"]
    assert read_texts(Source("org/set", "en", "validation", "body"), tmp_path) == ["b"]
    with pytest.raises(ScenarioError, match=r"(?i)as a data set of the hub it cannot be loaded: .*config"):
        read_texts(Source("org/set"), tmp_path)
    with pytest.raises(ScenarioError, match=r'cannot be loaded: Unknown split "train"'):
        read_texts(Source("org/set", "en", "train"), tmp_path)


def test_a_hub_out_of_reach_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ScenarioError, match=r"`no/set` is no local path.*without a network, name local files"):
        read_texts(Source("no/set"), tmp_path)
