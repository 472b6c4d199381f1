"""The judgement of one model: does the engine answer as plain ``transformers`` does, or does it refuse the model by name?"""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.runtime.kinds import KindChoice
from flexgen_helm.types import Result
from tests.reference import Agreement, Greedy, Reference
from tests.survey.configs import tiny_config
from tests.survey.variants import VARIANTS
from tests.survey.weights import FIRST_TOKEN, LAST_TOKEN, Probe, build_model

Outcome = Literal["packed", "single", "refused", "wrong", "crashed", "not built"]
POLICY = Policy(gpu_batch_size=16, num_gpu_batches=2, gpu_batch_tokens=32)
SHARED_PREFIX = 23
LENGTHS = (1, 2, 7, 8, 9, 17, 23, 24, 31, 33, 40, 47, 60, 150)
"""Lengths of the prompts; from ``SHARED_PREFIX`` on, all but the last begin with the same tokens."""
DISAGREEMENT = 1e-3
"""Largest difference, in nats, between the library's cached and plain forwards that is called rounding."""
HARDLY = 1e-3
"""Dependence on tokens 20 back, in nats, below which a mistake about them might not show."""


@dataclass(frozen=True)
class Verdict:
    """What became of one type or variant."""

    name: str
    outcome: Outcome
    remark: str = ""
    """The reason, if it is not served, and what a reader must know otherwise."""
    tokens: int = 0
    """Generated tokens compared."""
    ties: int = 0
    worst_token: float = 0.0
    """Largest difference of a generated token's or candidate's log-probability, in nats."""
    worst_prompt: float = 0.0
    """Largest difference of a prompt token's log-probability, in nats."""
    factor: float = 0.0
    """Of the random weights."""
    seconds: float = 0.0


def survey_jobs() -> list[Job]:
    """Returns the greedy jobs that every model answers: ragged, half of them behind a shared prefix."""
    chance = random.Random(5)
    prefix = _tokens(chance, SHARED_PREFIX)
    jobs = []
    for number, length in enumerate(LENGTHS):
        shares = SHARED_PREFIX <= length < LENGTHS[-1]
        tokens = prefix + _tokens(chance, length - SHARED_PREFIX) if shares else _tokens(chance, length)
        jobs.append(
            Job(
                token_ids=tokens,
                max_new_tokens=1 + number % 12,
                score_prompt=number % 3 != 1,
                top_logprobs=(10, 0, 3)[number % 3],
            )
        )
    return jobs


def _tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]


def judge(name: str, rows: KindChoice = "auto") -> Verdict:
    """Builds the tiny model of a type or variant and judges it. Never raises.

    Args:
        name: Of a type or variant.
        rows: Kind of rows to force, as `Engine.from_pretrained` takes it.
    """
    begin, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            verdict = _judge(name, Path(folder), rows)
    except Exception as error:
        verdict = Verdict(name, "crashed", _described(error))
    finally:
        torch.set_num_threads(threads)
    return replace(verdict, seconds=round(time.perf_counter() - begin, 1))


def _judge(name: str, folder: Path, rows: KindChoice) -> Verdict:
    try:
        factor, probe = save_model(name, folder)
        reference: Reference = Reference(folder)
        differs = disagreement(reference)
    except Exception as error:
        return Verdict(name, "not built", _described(error))
    remarks = (
        [] if probe.dependence > HARDLY else [f"what it predicts hardly depends on tokens 20 back ({probe.dependence:.0e})"]
    )
    jobs = survey_jobs()
    try:
        with Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY, rows=rows) as engine:
            kind, results = engine.rows, engine.run(jobs)
    except UnsupportedModel as error:
        return Verdict(name, "refused", "; ".join([reason(error, folder), *remarks]), factor=factor)
    agreement = compare(jobs, results, reference)
    if differs > DISAGREEMENT:
        remarks.append(f"generate and the plain forward of transformers differ by {differs:.1g}")
        forward = compare(jobs, results, ForwardReference(reference))
        if len(forward.failures) < len(agreement.failures):
            agreement = forward
            remarks.append("compared with the plain forward")
    remarks += agreement.failures[:3]
    return Verdict(
        name,
        "wrong" if agreement.failures else kind,
        "; ".join(remarks),
        agreement.tokens,
        agreement.ties,
        agreement.worst_token,
        agreement.worst_prompt,
        factor,
    )


def save_model(name: str, folder: Path) -> tuple[float, Probe]:
    """Saves the tiny model of a type or variant; returns the factor of its weights and how it reacts."""
    variant = VARIANTS.get(name)
    config = tiny_config(variant.kind, variant.changes) if variant else tiny_config(name)
    model, factor, probe = build_model(config)
    model.save_pretrained(folder)
    if model.config.model_type != config.model_type:
        # Checkpoints of such a type hold the configuration of all its parts.
        config.save_pretrained(folder)
    return factor, probe


def compare(jobs: Sequence[Job], results: Sequence[Result], reference: Reference) -> Agreement:
    """Compares answers with the reference's, one at a time."""
    agreement = Agreement()
    for job, result in zip(jobs, results, strict=True):
        agreement.add(job, result, reference)
    return agreement


def disagreement(reference: Reference) -> float:
    """Largest difference, in nats, between the library's ``generate`` and its own forward of the same tokens."""
    worst = 0.0
    for length in (1, 5, 40):
        prompt = _tokens(random.Random(length), length)
        greedy = reference.greedy(prompt, 6)
        plain = reference.log_probs([*prompt, *greedy.token_ids])[length - 1 : -1]
        worst = max(worst, float((plain - greedy.log_probs).abs().nan_to_num(torch.inf).max()))
    return worst


class ForwardReference(Reference):
    """The reference without ``generate``: each token comes from a plain forward of all tokens before it."""

    def __init__(self, reference: Reference) -> None:
        self.model = reference.model

    def greedy(self, ids: Sequence[int], max_new_tokens: int, *, eos: int | None = None) -> Greedy:
        tokens: list[int] = []
        rows: list[torch.Tensor] = []
        ends = self.end_tokens if eos is None else {eos}
        while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in ends):
            rows.append(self.log_probs([*ids, *tokens])[-1])
            tokens.append(int(rows[-1].argmax()))
        return Greedy(tokens, torch.stack(rows))


def reason(error: UnsupportedModel, folder: Path) -> str:
    """The reason of a refusal, without what is the same for every model."""
    text = str(error).replace(str(folder), "").strip()
    text = re.sub(r"^\([\w.-]+\) (cannot run in packed rows: )?", "", text)
    return text.split(" Evaluate it with HELM")[0].rstrip(".")


def _described(error: BaseException) -> str:
    """One line: the class and the beginning of the message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
