"""Answers of one run that a test chooses, without files; and run folders whose `flexgen.json` names a machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from flexgen_helm.gate.config import parse_config
from flexgen_helm.gate.evidence import Evidence, digested, gather
from flexgen_helm.gate.finding import Finding
from flexgen_helm.gate.gates import GATES
from flexgen_helm.reports.answers import REQUEST_COLUMNS, ROW_COLUMNS, Answers, RunFacts
from flexgen_helm.reports.engine_record import EngineRecord, engine_record
from flexgen_helm.reports.fidelity_results import FidelityResult
from tests.reports.synthetic import Answer, Suite, record_of

MACHINE = {
    "processor": "x86_64 Some Processor",
    "instructions": "00112233",
    "device": "cpu",
    "threads": 2,
    "variables": {},
    "torch": "2.15.0",
    "transformers": "5.23.0",
}
BASE, W4 = "flexgen/org/model", "flexgen/org/model@w4"


def engine(deployment: str = BASE, **changes: Any) -> EngineRecord:
    return engine_record(record_of(deployment, **{"environment": MACHINE, **changes}))


@dataclass(frozen=True)
class One:
    """What a model did with one instance."""

    score: float = 1.0
    logprob: float = math.nan
    text: str = "A"
    tokens: float = 1.0
    parsable: float = 1.0
    returned: str = "r"
    prompt: str = "p"


def answers(
    ones: Sequence[One], served: EngineRecord | None = None, *, name: str = "a", scenario: str = "run", **facts: Any
) -> Answers:
    """Returns a run of which instance i is the i-th; a text that is empty stands for a choice that is scored."""
    rows, requests = [], []
    for number, one in enumerate(ones):
        key = {"scenario": scenario, "instance": f"id{number}", "perturbation": "", "trial": 0, "part": 0}
        scored = not one.text
        rows.append(
            {
                **key,
                "split": "test",
                "score": one.score,
                "logprob": one.logprob if scored else math.nan,
                "answer": one.text,
                "answer_logprob": one.logprob,
                "tokens": math.nan if scored else one.tokens,
                "parsable": math.nan if scored else one.parsable,
                "correct": "",
                "length": 1,
                "prompt": one.prompt,
                "counts": True,
                "cluster": f"{scenario} 0",
            }
        )
        asked = {"mode": "", "reference": 0 if scored else -1, "logprob": one.logprob, "text": one.text}
        requests.append({**key, **asked, "prompt": one.prompt, "length": 1, "returned": one.returned})
    run = RunFacts(scenario, "group", "exact_match", False, None, served, {"logprob": "nothing is scored"})
    return Answers(
        name=name,
        deployment=BASE,
        runs={scenario: replace(run, **facts)},
        rows=pd.DataFrame(rows, columns=list(ROW_COLUMNS)),
        requests=pd.DataFrame(requests, columns=list(REQUEST_COLUMNS)),
        texts=lambda _: {},
    )


@dataclass(frozen=True)
class Pair:
    """A baseline and a candidate."""

    before: Sequence[One]
    after: Sequence[One]
    engines: tuple[EngineRecord | None, EngineRecord | None] = field(default_factory=lambda: (engine(), engine()))
    fidelity: FidelityResult | None = None
    lower_is_better: bool = False

    def evidence(self) -> Evidence:
        facts: dict[str, Any] = {"lower_is_better": self.lower_is_better}
        before, after = (
            digested(answers(ones, served, **facts))
            for ones, served in zip((self.before, self.after), self.engines, strict=True)
        )
        return gather(before, after, self.fidelity)[0]

    def judge(self, gate: str, threshold: float | None = None) -> Finding:
        rule = {gate: True if threshold is None else {"threshold": threshold}}
        return GATES[gate](self.evidence(), parse_config({"gates": rule}).rules[gate])


def scored(scores: Sequence[float]) -> list[One]:
    return [One(score=score) for score in scores]


def run_folders(folder: Path, deployment: str = BASE, answers: Sequence[Answer] | None = None, **record: Any) -> Path:
    """Writes a suite of two runs: one that generates, one that scores choices."""
    suite = Suite(folder, deployment, {"environment": MACHINE, **record})
    suite.run("mmlu:subject=a", answers or [Answer(score=float(number % 2)) for number in range(20)])
    choices = [Answer(score=1.0, logprobs=(-1.0 - number, -2.0, -3.0, -4.0)) for number in range(20)]
    suite.run("hellaswag", choices, method="multiple_choice_separate_original", groups=("hellaswag",))
    return folder
