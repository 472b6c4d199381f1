"""Verdicts as a table for people, as JUnit XML for CI servers, and as JSON. No text that was read acts as markup or control."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

from flexgen_helm.errors import FlexGenError
from flexgen_helm.gate.verdict import PASSED, REGRESSION, Checked, Verdict, status_of

UNPRINTABLE = re.compile("[^\t\n\x20-\x7e\xa0-\u2027\u202f-\u2065\u2070-\ud7ff\ue000-\ufeff\uff00-\ufffd\U00010000-\U0010ffff]")
"""Control characters, also those that turn text around, and what XML 1.0 does not allow."""
RESULTS = {PASSED: "passes", REGRESSION: "REGRESSION"}
DIGITS = 12
"""Digits behind the point that are shown at most; what is left is rounding."""
UNITS = {"nats": " nats", "percent": " %"}
TITLES = ("gate", "verdict", "value", "threshold", "detectable", "reason")


def clean(text: str) -> str:
    """Return text in one line without characters that a terminal or XML would act on."""
    return UNPRINTABLE.sub("\ufffd", " ".join(text.split()))


def figure(value: float | None, unit: str, *, signed: bool = False) -> str:
    """Return a value in words.

    Args:
        value: None: empty.
        unit: See `flexgen_helm.gate.config.Spec.unit`.
        signed: Whether a plus sign stands before values above 0.
    """
    if value is None:
        return "-"
    value, sign = round(value, DIGITS), "+" if signed else ""
    if unit == "share":
        return f"{100 * value:{sign}.2f} %"
    return f"{value:{sign}.4g}{UNITS.get(unit, '')}"


def table(checked: Sequence[Checked]) -> Iterator[str]:
    """Yield the lines of the tables, one for each candidate, and the result of each."""
    for each in checked:
        yield f"{clean(each.candidate)} against {clean(each.baseline)}"
        lines = [TITLES, *(_cells(verdict) for verdict in each.verdicts)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
        for line in lines:
            padded = [cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)]
            yield "  " + "  ".join(padded).rstrip()
        yield from (f"  note: {clean(note)}" for note in each.notes)
        yield f"  result: {result(each)}"


def result(checked: Checked) -> str:
    """Return the result for one candidate in a sentence."""
    named = [f"{each.gate} of {clean(each.subject)}" for each in checked.verdicts if _stops(checked, each)]
    if checked.status == PASSED:
        return "passes"
    if not named:
        return "undecided: no gate that vouches for the answers passes"
    return f"{RESULTS.get(checked.status, 'undecided')}: {', '.join(named)}"


def _stops(checked: Checked, verdict: Verdict) -> bool:
    if checked.status == REGRESSION:
        return verdict.word == "fails"
    return verdict.word == "inconclusive" and verdict.required


def _cells(verdict: Verdict) -> tuple[str, ...]:
    name = verdict.gate if verdict.subject == "all runs" else f"{verdict.gate} of {verdict.subject}"
    word = verdict.word.upper() if verdict.word == "fails" else verdict.word
    signed = verdict.gate in ("margin", "logprob", "unparsable")
    required = " (required)" if verdict.required and verdict.word == "inconclusive" else ""
    value = figure(verdict.value, verdict.unit, signed=signed)
    return (clean(name), word + required, value, *_bounds(verdict), clean(verdict.reason))


def _bounds(verdict: Verdict) -> tuple[str, str]:
    # What a test finds is a share of the answers, not a probability.
    unit = "share" if verdict.unit == "p" else verdict.unit
    return figure(verdict.threshold, verdict.unit), figure(verdict.effect, unit)


def as_json(checked: Sequence[Checked]) -> str:
    """Return all verdicts as JSON text."""
    content = [{"result": RESULTS.get(each.status, "undecided"), **asdict(each)} for each in checked]
    return json.dumps({"status": status_of(checked), "candidates": content}, indent=2) + "\n"


def as_junit(checked: Sequence[Checked]) -> str:
    """Return all verdicts as JUnit XML: a suite for each candidate, a case for each gate.

    A gate that fails is a failure; an inconclusive one is skipped, or an error where it is required. A candidate of which no
    gate vouches for the answers has one more case, which is an error.
    """
    root = ElementTree.Element("testsuites", name="flexgen-helm check")
    for each in checked:
        suite = ElementTree.SubElement(root, "testsuite", name=clean(f"{each.candidate} against {each.baseline}"))
        for verdict in each.verdicts:
            case = _case(suite, each, f"{verdict.gate} of {verdict.subject}")
            kinds = {"fails": "failure", "inconclusive": "error" if verdict.required else "skipped"}
            if verdict.word in kinds:
                ElementTree.SubElement(case, kinds[verdict.word], message=clean(verdict.reason)).text = _told(verdict)
            else:
                ElementTree.SubElement(case, "system-out").text = _told(verdict)
        if result(each).startswith("undecided: no gate"):
            ElementTree.SubElement(_case(suite, each, "decided"), "error", message=result(each))
        for name, kind in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            suite.set(name, str(len(list(suite.iter(kind)))))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _case(suite: ElementTree.Element, checked: Checked, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=clean(f"flexgen_helm.{checked.candidate}"), name=clean(name))


def _told(verdict: Verdict) -> str:
    threshold, effect = _bounds(verdict)
    value = figure(verdict.value, verdict.unit)
    return clean(f"{verdict.word}: {value}, threshold {threshold}, detectable {effect}; {verdict.reason}")


def write(file: Path, text: str, option: str) -> None:
    """Write a result file.

    Args:
        file: Its folder is made if it is missing.
        text: Of the file.
        option: Of the command, for the message.

    Raises:
        FlexGenError: It cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FlexGenError(f"{file} cannot be written ({error.strerror}). Give another {option}.") from error
