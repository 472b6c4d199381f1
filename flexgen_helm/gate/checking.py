"""A whole check: every candidate through every gate that is on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from flexgen_helm.gate.config import SPECS, GateConfig, Rule
from flexgen_helm.gate.evidence import Evidence, gather
from flexgen_helm.gate.gates import ALONE, GATES
from flexgen_helm.gate.sides import Finder, Side
from flexgen_helm.gate.verdict import Checked, Verdict
from flexgen_helm.reports.answers import Answers
from flexgen_helm.reports.comparing import Choices
from flexgen_helm.reports.fidelity_results import find_fidelity, read_fidelity
from flexgen_helm.reports.naming import check_same_model


@dataclass(frozen=True)
class Check:
    """What is checked, and how."""

    baseline: str
    """``SUITE[:MODEL]``, a baseline file, or samples of lm-eval: a file or a folder."""
    candidates: Sequence[str]
    config: GateConfig = field(default_factory=GateConfig)
    choices: Choices = field(default_factory=Choices)


def check(what: Check, *, say: Callable[[str], None] = lambda _: None) -> list[Checked]:
    """Check candidates against a baseline.

    Args:
        what: Both sides, gates and choices.
        say: Told what happens, a line at a time.

    Returns:
        One for each candidate; `flexgen_helm.gate.verdict.status_of` makes the exit status of them.

    Raises:
        FlexGenError: Something cannot be found, read or compared; the message says why.
    """
    finder = Finder(what.choices, what.config.lm_eval)
    baseline = finder.one(what.baseline)
    candidates = finder.several(what.candidates, baseline)
    results = read_fidelity(what.choices.fidelity)
    before = _read(baseline, say)
    checked = []
    for side in candidates:
        after = _read(side, say)
        if not what.choices.other_models and "lm-eval" not in (baseline.kind, side.kind):
            check_same_model(before, after, (before.engine, after.engine))
        fidelity = find_fidelity(results, before.engine, after.engine)
        whole, alone = gather(before, after, fidelity, common_runs=what.choices.common_runs)
        verdicts = [*judge(what.config, whole, GATES), *(one for each in alone for one in judge(what.config, each, ALONE))]
        names = [each.name if before.name != after.name else f"{each.name} of {each.place[0]}" for each in (baseline, side)]
        checked.append(Checked(names[0], names[1], verdicts, tuple(_notes(whole))))
    return checked


def record(text: str, choices: Choices, config: GateConfig) -> Answers:
    """Return the answers of one configuration, for a baseline file.

    Args:
        text: As `Check.baseline`.
        choices: How it is found.
        config: Says what is read of lm-eval's files.

    Raises:
        FlexGenError: It cannot be found or read.
    """
    return Finder(choices, config.lm_eval).one(text).read()


def _read(side: Side, say: Callable[[str], None]) -> Answers:
    say(f"reading {side.name}")
    return replace(side.read(), name=side.name)


def judge(config: GateConfig, evidence: Evidence, names: Iterable[str]) -> Iterator[Verdict]:
    """Yield the verdicts of the gates that are on.

    Args:
        config: The rules.
        evidence: What is judged.
        names: Of the gates.
    """
    for name in names:
        rule: Rule = config.rules[name]
        if not rule.enabled:
            continue
        found = GATES[name](evidence, rule)
        yield Verdict(
            gate=name,
            subject=evidence.subject,
            word=found.word,
            value=found.value,
            threshold=found.threshold,
            effect=found.effect,
            reason=found.reason,
            unit=SPECS[name].unit,
            required=rule.required,
            vouches=SPECS[name].vouches,
        )


def _notes(evidence: Evidence) -> Iterator[str]:
    for side, number in evidence.missing.items():
        if number:
            yield f"the {side} lacks {number:,} rows that the other side has; only common ones are judged"
    if evidence.part.left_out:
        yield f"judged alone, because they have no scores that are shares of right answers: {', '.join(evidence.part.left_out)}"
