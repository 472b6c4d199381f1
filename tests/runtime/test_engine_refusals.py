"""Models that packed rows would compute wrongly run in single rows, or are refused by name and reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexgen_helm import Engine, Job
from flexgen_helm.errors import FlexGenError, InvalidJob, PolicyError, UnsupportedModel
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.rows.packed import PackedRows
from tests.jobs import random_tokens
from tests.models import LONGROPE_LENGTH, SINGLE
from tests.reference import Agreement
from tests.runtime.test_exactness import MECHANISMS, slow_but
from tests.workbench import POLICY, Workbench


@pytest.mark.parametrize("family", SINGLE)
def test_packed_rows_refuse_by_name_and_reason(bench: Workbench, family: str) -> None:
    with pytest.raises(UnsupportedModel, match=SINGLE[family].reason) as refusal:
        Engine.from_pretrained(str(bench.folder(family)), dtype="float32", device="cpu", policy=POLICY, rows="packed")
    assert f"({family})" in str(refusal.value)
    assert "rows at 'auto'" in str(refusal.value)


@pytest.mark.parametrize("family", slow_but(MECHANISMS, SINGLE))
def test_single_rows_are_chosen_in_one_line(bench: Workbench, family: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="flexgen_helm")
    with Engine.from_pretrained(str(bench.folder(family)), dtype="float32", device="cpu", policy=POLICY) as engine:
        assert engine.rows == engine.numerics.rows.kind == "single"
    (line,) = [record.getMessage() for record in caplog.records if "single rows" in record.getMessage()]
    assert re.search(SINGLE[family].reason, line)
    assert f"({family})" in line


def test_single_rows_can_be_forced(bench: Workbench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="flexgen_helm")
    with Engine.from_pretrained(str(bench.folder("llama")), policy=POLICY, device="cpu", rows="single") as engine:
        assert engine.rows == "single"
    assert not [record for record in caplog.records if "rows" in record.getMessage()]


def test_an_unknown_kind_of_rows_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(FlexGenError, match=r"rows is 'both'.*'auto', 'packed' or 'single'"):
        Engine.from_pretrained(str(tmp_path / "nothing"), rows="both")  # type: ignore[arg-type]


def test_a_policy_of_another_type_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"policy is \{'gpu_batch_size': 16\}. Give a Policy"):
        Engine.from_pretrained(str(tmp_path / "nothing"), policy={"gpu_batch_size": 16})  # type: ignore[arg-type]


def test_longrope_is_served_up_to_its_original_length(bench: Workbench) -> None:
    engine, agreement = bench.engine("phi3_longrope"), Agreement()
    lengths = [(1, 5), (9, 8), (LONGROPE_LENGTH - 5, 5), (LONGROPE_LENGTH, 0)]
    jobs = [
        Job(token_ids=random_tokens(length, length), max_new_tokens=new, score_prompt=True, top_logprobs=10 if new else 0)
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


@pytest.mark.parametrize("value", [torch.ones(1), 0.5, True])
def test_an_argument_of_attention_that_is_not_known_is_refused(bench: Workbench, value: Any) -> None:
    model = RecordedModel(AutoModelForCausalLM.from_pretrained(bench.folder("llama")))
    rows = PackedRows(model, PagedCache())
    attend = ALL_ATTENTION_FUNCTIONS[rows.model.model.config._attn_implementation]
    qkv = [torch.ones(1, 2, 4, 8)] * 3
    with pytest.raises(UnsupportedModel, match="unsupported arguments: position_bias"):
        attend(model.layers[0], *qkv, None, position_bias=value, dropout=0.0)
