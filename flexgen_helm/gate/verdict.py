"""What a gate says, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_helm.statistics.margins import Verdict as Word

PASSED, REGRESSION, UNDECIDED = 0, 1, 2
"""Exit statuses. Bad input is 2 too: nothing was decided."""


@dataclass(frozen=True)
class Verdict:
    """The result of one gate."""

    gate: str
    subject: str
    """``all runs``, or the run entry that was judged alone."""
    word: Word
    value: float | None
    """What was measured, in the gate's unit; None: nothing could be."""
    threshold: float | None
    """What it was compared with, in the same unit; None: there is none."""
    effect: float | None
    """The smallest true change that would have been found with a probability of 80 %, in the same unit; None: not known."""
    reason: str
    """One sentence."""
    unit: str
    """See `flexgen_helm.gate.config.Spec.unit`."""
    required: bool
    """Whether an inconclusive verdict stops the build."""
    vouches: bool
    """See `flexgen_helm.gate.config.Spec.vouches`."""


@dataclass(frozen=True)
class Checked:
    """All verdicts on one candidate."""

    baseline: str
    candidate: str
    verdicts: Sequence[Verdict]
    notes: Sequence[str] = ()
    """What must be known of the comparison as a whole."""

    @property
    def status(self) -> int:
        """`REGRESSION` if a gate fails; else `UNDECIDED` if a required one is inconclusive or none that vouches passes."""
        if any(each.word == "fails" for each in self.verdicts):
            return REGRESSION
        if any(each.word == "inconclusive" and each.required for each in self.verdicts):
            return UNDECIDED
        passed = any(each.word == "passes" and each.vouches for each in self.verdicts)
        return PASSED if passed else UNDECIDED


def status_of(checked: Sequence[Checked]) -> int:
    """Return the exit status for several candidates: a regression comes before what could not be decided."""
    statuses = {each.status for each in checked}
    return next((status for status in (REGRESSION, UNDECIDED) if status in statuses), PASSED)
