"""The table, JUnit XML and JSON; no name or text acts as control, markup or line end. And the exit status."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_helm.errors import FlexGenError
from flexgen_helm.gate.output import as_json, as_junit, clean, figure, table, write
from flexgen_helm.gate.verdict import Checked, Verdict, status_of

PASSES = Verdict("margin", "all runs", "passes", -0.001, 0.01, 0.005, "fine", "share", required=False, vouches=True)
FAILS = replace(PASSES, gate="flips", word="fails", value=0.0001, unit="p", reason="lost")
OPEN = replace(PASSES, gate="recovery", word="inconclusive", value=None, effect=None, unit="percent", reason="few")
NEEDED = replace(OPEN, required=True)
SPEED = replace(PASSES, gate="throughput", vouches=False)


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        ([PASSES], 0),
        ([PASSES, OPEN], 0),
        ([PASSES, NEEDED], 2),
        ([PASSES, NEEDED, FAILS], 1),
        ([OPEN], 2),
        ([], 2),
        ([SPEED, OPEN], 2),
        ([replace(SPEED, word="fails"), PASSES], 1),
    ],
)
def test_exit_status(verdicts: list[Verdict], status: int) -> None:
    assert Checked("a", "b", verdicts).status == status
    assert status_of([Checked("a", "b", [PASSES]), Checked("a", "c", verdicts)]) == status


def test_a_regression_comes_before_what_is_undecided() -> None:
    assert status_of([Checked("a", "b", [NEEDED]), Checked("a", "c", [FAILS])]) == 1
    assert status_of([]) == 0


def test_the_table() -> None:
    shown = list(table([Checked("16-bit", "@w4", [PASSES, FAILS, NEEDED], ["a note"])]))
    assert shown == [
        "@w4 against 16-bit",
        "  gate      verdict                  value    threshold  detectable  reason",
        "  margin    passes                   -0.10 %  1.00 %     0.50 %      fine",
        "  flips     FAILS                    0.0001   0.01       0.50 %      lost",
        "  recovery  inconclusive (required)  -        0.01 %     -           few",
        "  note: a note",
        "  result: REGRESSION: flips of all runs",
    ]
    assert list(table([Checked("a", "b", [NEEDED, PASSES])]))[-1] == "  result: undecided: recovery of all runs"
    assert "no gate that vouches" in list(table([Checked("a", "b", [OPEN])]))[-1]


def test_figures() -> None:
    assert [figure(0.5, unit) for unit in ("share", "percent", "nats", "p", "")] == [
        "50.00 %",
        "0.5 %",
        "0.5 nats",
        "0.5",
        "0.5",
    ]
    assert [figure(x, "nats", signed=True) for x in (0.25, -0.25, 1e-17)] == ["+0.25 nats", "-0.25 nats", "+0 nats"]
    assert figure(None, "share") == "-"


def test_junit_counts_failures_errors_and_skipped() -> None:
    root = ElementTree.fromstring(as_junit([Checked("a", "b", [PASSES, FAILS, OPEN, NEEDED]), Checked("a", "c", [OPEN])]))
    first, second = root.findall("testsuite")
    assert first.attrib == {"name": "b against a", "tests": "4", "failures": "1", "errors": "1", "skipped": "1"}
    assert [case.get("name") for case in first] == [f"{x} of all runs" for x in ("margin", "flips", "recovery", "recovery")]
    failure = first.find("testcase/failure")
    assert failure is not None
    assert failure.get("message") == "lost"
    assert second.attrib == {"name": "c against a", "tests": "2", "failures": "0", "errors": "1", "skipped": "1"}


def test_json_has_everything() -> None:
    content = json.loads(as_json([Checked("a", "b", [FAILS])]))
    assert content["status"] == 1
    (candidate,) = content["candidates"]
    assert (candidate["result"], candidate["verdicts"][0]["gate"], candidate["verdicts"][0]["value"]) == (
        "REGRESSION",
        "flips",
        1e-4,
    )


@given(st.text(st.characters()))
def test_hostile_strings_are_text(text: str) -> None:
    hostile = replace(FAILS, subject=text, reason=f"<b>\x1b[31m{text}]]>")
    checked = [Checked(text, f"\x1b]0;{text}\x07\u202e", [hostile], [text])]
    shown = list(table(checked))
    assert len(shown) == 5
    assert not any(letter in "".join(shown) for letter in "\x1b\x07\x9b\r\n\u202e\u2028")
    root = ElementTree.fromstring(as_junit(checked).encode("utf-8"))
    (case,) = root.iter("testcase")
    assert [child.tag for child in case] == ["failure"]
    assert json.loads(as_json(checked))["candidates"][0]["baseline"] == text
    assert clean(clean(text)) == clean(text)


def test_letters_of_all_languages_stay() -> None:
    assert clean("Füße 東京 שלום 😀\n x") == "Füße 東京 שלום 😀 x"


def test_a_file_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(FlexGenError, match=r"cannot be written .* Give another --junit"):
        write(tmp_path, "", "--junit")
