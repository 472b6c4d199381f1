"""Models that packed rows would compute wrongly are refused by name and reason."""

from __future__ import annotations

import pytest

from flexgen_helm import Engine, Job
from flexgen_helm.errors import InvalidJob, UnsupportedModel
from tests.jobs import random_tokens
from tests.models import LONGROPE_LENGTH, REFUSED
from tests.reference import Agreement
from tests.runtime.conftest import POLICY, Workbench


@pytest.mark.parametrize("family", REFUSED)
def test_refused_family_is_named_with_the_reason(bench: Workbench, family: str) -> None:
    with pytest.raises(UnsupportedModel, match=REFUSED[family].reason) as refusal:
        Engine.from_pretrained(str(bench.folder(family)), dtype="float32", device="cpu", policy=POLICY)
    assert family in str(refusal.value)


def test_longrope_is_served_up_to_its_original_length(bench: Workbench) -> None:
    engine, agreement = bench.engine("phi3_longrope"), Agreement()
    lengths = [(1, 5), (9, 8), (LONGROPE_LENGTH - 5, 5), (LONGROPE_LENGTH, 0)]
    jobs = [
        Job(token_ids=random_tokens(length, length), max_new_tokens=new, score_prompt=True, top_logprobs=10)
        for length, new in lengths
    ]
    for job, result in zip(jobs, engine.run(jobs), strict=True):
        agreement.add(job, result, bench.reference("phi3_longrope"))
    assert not agreement.failures, agreement.failures


@pytest.mark.parametrize(("length", "new"), [(LONGROPE_LENGTH - 2, 12), (LONGROPE_LENGTH + 8, 1)])
def test_longrope_refuses_a_longer_job(bench: Workbench, length: int, new: int) -> None:
    job = Job(token_ids=random_tokens(3, length), max_new_tokens=new)
    with pytest.raises(InvalidJob, match=rf"\b{LONGROPE_LENGTH}\b"):
        bench.engine("phi3_longrope").run([job])
