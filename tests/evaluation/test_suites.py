"""Which suites are found, by name and by path."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_helm.errors import FlexGenError
from flexgen_helm.evaluation.suites import Suite, find_suite, packaged_suites

ENTRY = 'entries: [{description: "dyck_language:num_parenthesis_pairs=2,model=text"}]'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run_entries.conf").write_text(ENTRY)
    return tmp_path / "mine"


def test_suites_of_the_package_go_by_name() -> None:
    assert {"quickstart", "mmlu", "flexgen_paper"} <= set(packaged_suites())
    suite = find_suite("quickstart")
    assert (suite.name, suite.packaged, suite.run_entries.name) == ("quickstart", True, "run_entries.conf")
    assert suite.schema is not None
    assert find_suite("mmlu").schema is None


def test_other_suites_are_files_and_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "run_entries.conf"
    assert find_suite(str(folder)) == find_suite(str(file)) == Suite("mine", file, packaged=False)
    other = file.with_name("some.conf")
    other.write_text(ENTRY)
    assert find_suite(str(other)).name == "some"
    monkeypatch.chdir(folder)
    assert find_suite(".") == Suite("mine", file, packaged=False)
    assert find_suite("some.conf") == Suite("some", other, packaged=False)


def test_a_name_wins_over_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.rename(folder.with_name("mmlu")).parent)
    assert find_suite("mmlu").packaged
    assert not find_suite("./mmlu").packaged


def test_a_suite_of_the_package_brings_its_data_by_path_too(folder: Path) -> None:
    suite = find_suite("quickstart")
    link = folder.with_name("link")
    link.symlink_to(suite.run_entries.parent)
    assert find_suite(str(suite.run_entries)).packaged
    assert find_suite(str(link)).packaged


@pytest.mark.parametrize(
    "content", ["metrics: []", "run_groups:", "run_groups: [", "run_groups: [{environment: {a: b}}]", "", "3"]
)
def test_a_schema_that_cannot_be_read_is_an_error_before_anything_runs(content: str, folder: Path) -> None:
    (folder / "schema.yaml").write_text(content)
    with pytest.raises(FlexGenError, match=r"schema\.yaml cannot be read as a schema of HELM .*run_groups"):
        find_suite(str(folder))


@pytest.mark.parametrize("name", ["quickstrt", "no/such/folder", "."])
def test_unknown_suites_are_errors_that_list_the_known(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FlexGenError, match=rf"no suite `{name}`.* flexgen_paper, .*mmlu, .*quickstart"):
        find_suite(name)


@pytest.mark.parametrize("content", ["", "entries: []"])
def test_an_empty_suite_is_an_error(content: str, folder: Path) -> None:
    (folder / "run_entries.conf").write_text(content)
    with pytest.raises(
        FlexGenError, match=r"run_entries\.conf (has no run entries|cannot be read).*Write for example entries:"
    ):
        find_suite(str(folder))


@pytest.mark.parametrize("content", [b"entries: [{", b"entries: [{priority: 1}]", b"entries: 3", b"\xff\xfe\x00"])
def test_what_helm_cannot_read_is_an_error(content: bytes, folder: Path) -> None:
    (folder / "run_entries.conf").write_bytes(content)
    with pytest.raises(FlexGenError, match=r"run_entries\.conf cannot be read as run entries \(.+\)\. Write for example"):
        find_suite(str(folder))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("lambada,model=text", r"`lambada,model=text` in line 3 of .*no colon .*Write `lambada:model=text`\."),
        ("mmlu:subject=anatomy,model", r"line 3 of .* has `model` where `name=value` is expected"),
        ("model=text", r"no colon behind the scenario's name\. Write `scenario:name=value,name=value`\."),
        ("a=b=c,model=text", r"no colon behind the scenario's name\. Write `scenario:name=value,name=value`\."),
    ],
)
def test_a_mistake_in_an_entry_is_named_with_its_line(entry: str, message: str, folder: Path) -> None:
    good = '{description: "dyck_language:num_parenthesis_pairs=2,model=text"}'
    (folder / "run_entries.conf").write_text(f'entries: [\n{good},\n{{description: "{entry}"}}\n]')
    with pytest.raises(FlexGenError, match=message):
        find_suite(str(folder))


def test_entries_of_every_form_of_helms_are_taken(folder: Path) -> None:
    descriptions = ("simple_mcqa", "a:b=c=d,model=text", "custom:path=C:/x,model=text")
    entries = ", ".join(f'{{description: "{description}"}}' for description in descriptions)
    (folder / "run_entries.conf").write_text(f"entries: [{entries}]")
    assert find_suite(str(folder)).num_entries == 3
