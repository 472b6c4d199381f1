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
from flexgen_helm.rows.choice import KindChoice
from flexgen_helm.types import Result
from tests.reference import Agreement, Reference
from tests.survey.configs import tiny_config
from tests.survey.truths import library_truths
from tests.survey.variants import VARIANTS
from tests.survey.weights import FIRST_TOKEN, LAST_TOKEN, Probe, build_model

Outcome = Literal["packed", "single", "refused", "wrong", "crashed", "not built"]
POLICY = Policy(gpu_batch_size=16, num_gpu_batches=2, gpu_batch_tokens=32)
SHARED_PREFIX = 23
LENGTHS = (1, 2, 7, 8, 9, 17, 23, 24, 31, 33, 40, 47, 60, 150)
"""Lengths of the prompts; from ``SHARED_PREFIX`` on, all but the last begin with the same tokens."""
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
        truths = library_truths(folder)
    except Exception as error:
        return Verdict(name, "not built", _described(error))
    remarks = [truth.remark for truth in truths if truth.remark]
    if probe.dependence <= HARDLY:
        remarks.append(f"what it predicts hardly depends on tokens 20 back ({probe.dependence:.0e})")
    jobs = survey_jobs()
    try:
        with Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY, rows=rows) as engine:
            kind, results = engine.rows, engine.run(jobs)
    except UnsupportedModel as error:
        return Verdict(name, "refused", "; ".join([reason(error, folder), *remarks]), factor=factor)
    compared = {truth.name: compare(jobs, results, truth.reference) for truth in truths}
    truth = min(compared, key=lambda name: len(compared[name].failures))
    agreement = compared[truth]
    if (rows, kind) == ("auto", "single"):
        remarks.insert(0, _why_not_packed(folder))
    if len(truths) > 1:
        remarks.append(f"compared with its {truth}")
    return Verdict(
        name,
        "wrong" if agreement.failures else kind,
        "; ".join([*remarks, *agreement.failures[:3]]),
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


def reason(error: UnsupportedModel, folder: Path) -> str:
    """The reason of a refusal, without what is the same for every model."""
    text = re.sub(r"^\([\w.-]+\) ", "", str(error).replace(str(folder), "").strip())
    text = re.split(r" Evaluate it with HELM| Leave rows at", text)[0].rstrip(".")
    return text.removeprefix("would be computed wrongly: ")


def _why_not_packed(folder: Path) -> str:
    try:
        Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY, rows="packed").close()
    except UnsupportedModel as error:
        return reason(error, folder)
    raise AssertionError("packed rows serve the model, but single rows were chosen")


def _described(error: BaseException) -> str:
    """One line: the class and the beginning of the message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
