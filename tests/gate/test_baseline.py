"""What is written to a baseline file is read again; what is no such file is refused."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.gate.baseline import DECIMALS, read_baseline, write_baseline
from flexgen_helm.gate.evidence import digested
from flexgen_helm.reports.answers import Answers
from tests.gate.made import One, answers, engine

DATE = "2026-11-29T00:00:00+00:00"
NUMBERS = st.floats(allow_nan=True, allow_infinity=False, width=64)
LOGPROBS = st.one_of(st.just(math.nan), st.floats(-1e4, 0))
TEXTS = st.text(st.characters(), max_size=5)
ONES = st.builds(One, NUMBERS, LOGPROBS, TEXTS, NUMBERS, st.sampled_from((0.0, 1.0)), st.text("0123456789abcdef"), TEXTS)


def round_trip(before: Answers, folder: Path) -> Answers:
    write_baseline(folder / "base.json", before, date=DATE)
    return read_baseline(folder / "base.json")


@settings(max_examples=60, deadline=None)
@given(st.lists(ONES, min_size=1, max_size=6), TEXTS.filter(bool), st.booleans())
def test_what_is_written_is_read_again(ones: list[One], scenario: str, known: bool) -> None:
    made = answers(ones, engine(bit_stable=None) if known else None, name="16-bit", scenario=scenario, score=0.5)
    before = digested(made)
    with tempfile.TemporaryDirectory() as folder:
        after = round_trip(before, Path(folder))
    rounding = 0.5001 * 10**-DECIMALS
    for one, other in ((before.rows, after.rows), (before.requests, after.requests)):
        exact = [name for name in one.columns if "logprob" not in name]
        pd.testing.assert_frame_equal(one[exact], other[exact], check_exact=True, check_dtype=False)
        rounded = [name for name in one.columns if "logprob" in name]
        pd.testing.assert_frame_equal(one[rounded], other[rounded], rtol=0, atol=rounding, check_dtype=False)
    assert (after.name, after.deployment, after.runs) == (before.name, before.deployment, before.runs)
    assert after.texts(scenario) == {}


def test_a_file_is_small_and_holds_no_texts(tmp_path: Path) -> None:
    ones = [One(logprob=-1.2345678901, text="secret answer", prompt="0123456789abcdef", returned="0123456789abcdef")] * 300
    write_baseline(tmp_path / "base.json", digested(answers(ones, engine())), date=DATE)
    text = (tmp_path / "base.json").read_text()
    assert "secret" not in text
    assert len(text) < 250 * 300
    assert len(text.splitlines()) > 300  # one line for an instance, so that a change can be read
    assert json.loads(text)["date"] == DATE
    assert list(tmp_path.iterdir()) == [tmp_path / "base.json"]


def test_what_is_no_baseline_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    write_baseline(file, digested(answers([One()], engine())), date=DATE)
    whole = file.read_text()
    content = json.loads(whole)

    def refused(text: str | bytes, message: str) -> None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(CorruptFile, match=message) as raised:
            read_baseline(file)
        assert str(raised.value).startswith(str(file))
        assert "Record it again" in str(raised.value)

    for torn in (whole[: len(whole) // 2], "", b"\xff\xfe", "[" * 100_000):
        refused(torn, "cannot be read as a baseline file")
    for foreign in ("[]", "{}", '"text"', '{"format": "other"}'):
        refused(foreign, "is no baseline file")
    refused(json.dumps(content | {"version": 99}), "version 99")
    refused(whole.replace('"name": "', '"name": "x'), "was changed since it was recorded")
    file.write_text(json.dumps(content, indent=4))
    assert read_baseline(file).name == content["name"]
    del content["checksum"]
    (line,) = content["runs"][0]["rows"]
    for changed in (
        content | {"engines": [{}]},
        content | {"runs": []},
        with_row(content, [line[0][:-1], line[1]]),
        with_row(content, [["id0", "", 0, 0, "test", "x", *line[0][6:]], line[1]]),
        with_row(content, [["id0", "", "0", *line[0][3:]], line[1]]),
    ):
        refused(json.dumps(changed), "is damaged")
    with pytest.raises(CorruptFile, match="cannot be read"):
        read_baseline(tmp_path / "missing.json")


def with_row(content: dict[str, Any], row: list[Any]) -> dict[str, Any]:
    return content | {"runs": [content["runs"][0] | {"rows": [row]}]}


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FlexGenError, match=r"cannot be written to .* Give another --record"):
        write_baseline(tmp_path / "file" / "base.json", digested(answers([One()])), date=DATE)
