"""Engines whose layers are divided into two stages: their answers are those of one process, bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexgen_helm import Engine, FlexGenError, Job, PolicyError, Result, UnsupportedModel
from flexgen_helm.errors import NotFinite
from flexgen_helm.processes import DRIVES
from tests.distributed.stages import FOLLOW, environment, free_port, pipeline
from tests.jobs import fixed_mix, random_tokens
from tests.models import save_tiny
from tests.workbench import NARROW, OWN_MEMORY

JOBS = [*fixed_mix(11, 20), *(Job(token_ids=random_tokens(i, 30), max_new_tokens=5, temperature=0.9, seed=i) for i in range(4))]
SLIDING, EXPERTS, TIED = "mistral", "mixtral", "qwen2"
OFFLOADED = replace(NARROW, weights=(0.0, 0.5, 0.5), cache=(0.0, 0.5, 0.5), hidden=(0.0, 0.5, 0.5), cpu_attention=0.0)


@pytest.fixture(scope="module")
def drives() -> Iterator[str]:
    """Two stages that meet once and make every engine of this file; gives what tells an engine to be divided."""
    with pipeline(2):
        yield os.environ.pop(DRIVES)


def answers(folder: Path, jobs: list[Job] = JOBS, **options: Any) -> list[Result]:
    options["policy"] = replace(options.get("policy", NARROW), num_lanes=None)
    return run(folder, jobs, **options)


def run(folder: Path, jobs: list[Job], **options: Any) -> list[Result]:
    with Engine.from_pretrained(str(folder), **{"device": "cpu", "dtype": "float32", "policy": NARROW, **options}) as engine:
        return engine.run(jobs)


def divided(drives: str, folder: Path, jobs: list[Job] = JOBS, **options: Any) -> list[Result]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DRIVES, drives)
        return run(folder, jobs, **options)


def tiny(tmp_path: Path, family: str) -> Path:
    return save_tiny(family, tmp_path)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        (SLIDING, {"policy": OFFLOADED, "device": OWN_MEMORY}),
        (EXPERTS, {"policy": replace(NARROW, weights=(0.0, 0.0, 1.0))}),
        (TIED, {"compression": "w4kv4s10", "policy": replace(NARROW, num_lanes=3)}),
        pytest.param("opt", {"policy": OFFLOADED}, marks=pytest.mark.slow),
        pytest.param("llama", {"compression": "w4kv4", "policy": OFFLOADED, "device": OWN_MEMORY}, marks=pytest.mark.slow),
        pytest.param("gpt_oss", {"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param("llama", {"device": OWN_MEMORY, "policy": replace(OFFLOADED, cpu_attention=1.0)}, marks=pytest.mark.slow),
    ],
)
def test_stages_answer_as_one_process(drives: str, tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    folder = tiny(tmp_path, family)
    assert divided(drives, folder, **options) == answers(folder, **options)


def test_only_the_job_whose_numbers_are_not_finite_fails(drives: str, tmp_path: Path) -> None:
    """K of layer 0 is not finite for a token that the self-check has not, on the first stage; the last one answers."""
    folder, bad = tiny(tmp_path, "llama"), 1
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][bad] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    jobs = [Job(token_ids=job.token_ids, max_new_tokens=3) for job in JOBS[:8]]
    expected = answers(folder, jobs)
    jobs.insert(3, Job(token_ids=[5, bad, 6], max_new_tokens=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DRIVES, drives)
        with Engine.from_pretrained(str(folder), device="cpu", dtype="float32", policy=NARROW) as engine:
            found = engine.run(jobs, on_error="return")
    assert isinstance(found.pop(3).error, NotFinite)
    assert found == expected


def test_what_a_stage_cannot_do_is_told_and_the_stages_live_on(drives: str, tmp_path: Path) -> None:
    single, folder = tiny(tmp_path, "falcon"), tiny(tmp_path, "llama")
    with pytest.raises(UnsupportedModel, match=r"single rows.*one process"):
        divided(drives, single)
    with pytest.raises(FlexGenError, match="order cannot be set"):
        divided(drives, folder, order="row")
    with pytest.raises(PolicyError, match="memory"):
        divided(drives, folder, max_memory={"host": "64KiB"})
    assert divided(drives, folder, JOBS[:3]) == answers(folder, JOBS[:3])


@pytest.mark.slow
def test_stages_end_with_the_first_process_though_its_engine_was_not_closed(tmp_path: Path) -> None:
    """As HELM's commands leave it."""
    folder = tiny(tmp_path, "llama")
    code = (
        "from flexgen_helm import Engine, Job; from flexgen_helm.runtime.pipeline.launch import begin_to_drive;"
        "begin_to_drive();"
        f"engine = Engine.from_pretrained({str(folder)!r}, device='cpu');"
        "print(len(engine.run([Job(token_ids=[5, 6], max_new_tokens=2)])[0].completions[0].token_ids))"
    )
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", FOLLOW], env={**os.environ, **environment(1, 2, port)}) as other:
        first = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment(0, 2, port)},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert (first.returncode, first.stdout.strip()) == (0, "2"), first.stderr
        assert other.wait(timeout=60) == 0


def test_a_divided_engine_gives_no_hidden_states(drives: str, tmp_path: Path) -> None:
    folder = tiny(tmp_path, "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DRIVES, drives)
        with (
            Engine.from_pretrained(str(folder), device="cpu", policy=NARROW) as engine,
            pytest.raises(FlexGenError, match="one process"),
        ):
            engine.final_hidden([[1, 2, 3]])


def test_one_process_has_no_lanes(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"num_lanes is 2, but layers are not divided.*Leave it out"):
        run(tiny(tmp_path, "llama"), JOBS[:1], policy=replace(NARROW, num_lanes=2))
    with pytest.raises(PolicyError, match="num_lanes must be an integer of at least 1, not 0"):
        replace(NARROW, num_lanes=0)


@pytest.mark.slow
def test_all_stages_are_described(drives: str, tmp_path: Path) -> None:
    folder = str(tiny(tmp_path, SLIDING))
    with Engine.from_pretrained(folder, policy=OFFLOADED, device=OWN_MEMORY, dtype="float32") as engine:
        whole = engine.describe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DRIVES, drives)
        with Engine.from_pretrained(folder, policy=OFFLOADED, device=OWN_MEMORY, dtype="float32") as engine:
            divided = engine.describe()
    assert whole.stages == ()
    first, last = divided.stages
    assert [(each.first_layer, each.last_layer) for each in (first, last)] == [(0, 0), (1, 1)]
    assert first.name.startswith("stage 1 of 2 (rank 0 on ")
    assert divided.weight_bytes == first.weight_bytes
    # Both have the embeddings, which are on the host here; layers and head are in slabs of one stage.
    elsewhere = sum(whole.weight_bytes.values()) - sum(first.weight_bytes.values()) - sum(last.weight_bytes.values())
    embeddings = -elsewhere
    assert 0 < embeddings < sum(first.weight_bytes.values())
    assert last.travel_bytes > first.travel_bytes > 0
