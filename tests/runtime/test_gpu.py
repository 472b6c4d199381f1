"""The same code on a CUDA device: levels A and B by a bit, level C against the CPU reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet
from torch import cuda, equal, log_softmax, tensor

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.rows.self_check import Verdict
from tests.jobs import fixed_mix, random_tokens
from tests.models import save_tiny
from tests.reference import Agreement, Reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_check")]
POLICY = Policy(gpu_batch_size=16, num_gpu_batches=2, gpu_batch_tokens=64)
SIMULATED = not cuda.is_available()


def mix(seed: int, count: int) -> list[Job]:
    """Jobs of every kind, with few new tokens on a simulated GPU: it is slow, and three sweeps have all kinds of rows."""
    return [replace(job, max_new_tokens=min(job.max_new_tokens, 3 if SIMULATED else 12)) for job in fixed_mix(seed, count)]


def slow(*values: object) -> ParameterSet:
    """Values of a parametrisation that takes long on a simulated GPU."""
    return pytest.param(*values, marks=pytest.mark.slow)


def real(*values: object) -> ParameterSet:
    """Values of a parametrisation of which a simulated GPU has an equal one in `tests.simulated_gpu.test_placements`."""
    return pytest.param(*values, marks=pytest.mark.slow if SIMULATED else ())


@pytest.mark.parametrize("family", ["llama", *map(slow, ["gemma2", "opt", "mistral", "gpt_oss"])])
def test_a_gpu_gives_the_answers_of_the_reference(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path)
    jobs, agreement = mix(3, 12), Agreement()
    with Engine.from_pretrained(str(folder), dtype="float32", device="cuda", policy=POLICY) as engine:
        assert isinstance(engine.self_check, Verdict)
        together = engine.run(jobs)
        few = slice(None, None, 3 if SIMULATED else 1)
        alone = [engine.run([job])[0] for job in jobs[few]] if engine.self_check.bit_stable else together[few]
        assert engine.stats.peak_bytes > 0
    reference = Reference(folder)
    for job, result in zip(jobs, together, strict=True):
        agreement.add(job, result, reference)
    assert not agreement.failures, agreement.failures
    assert alone == together[few]


@pytest.mark.parametrize(
    ("family", "overlap"),
    [
        real("llama", True),
        *(slow(family, overlap) for overlap in (True, False) for family in ("opt", "mistral", "mixtral")),
        slow("llama", False),
    ],
)
def test_placement_changes_no_bit_on_a_gpu(family: str, overlap: bool, tmp_path: Path) -> None:
    """Streams, events, pinned memory and slots; attention on the CPU is level C there and left out."""
    folder, jobs = str(save_tiny(family, tmp_path, num_layers=5)), mix(31, 24)
    with Engine.from_pretrained(folder, device="cuda", policy=POLICY) as engine:
        expected = engine.run(jobs)
    thirds = (0.2, 0.4, 0.4)
    policy = replace(POLICY, weights=thirds, cache=thirds, hidden=thirds, cpu_attention=0, overlap=overlap)
    with Engine.from_pretrained(folder, device="cuda", policy=policy, offload_folder=tmp_path / "offload") as engine:
        assert engine.run(jobs) == expected
        assert engine.run(jobs) == expected


def test_hidden_states_and_head_give_the_logits_of_a_run_on_a_gpu(tmp_path: Path) -> None:
    folder, tokens = str(save_tiny("llama", tmp_path, num_layers=5)), random_tokens(3, 50)
    thirds = (0.2, 0.4, 0.4)
    policy = replace(POLICY, weights=thirds, cache=thirds, hidden=thirds, cpu_attention=0)
    with Engine.from_pretrained(folder, device="cuda", policy=policy, offload_folder=tmp_path / "offload") as engine:
        (expected,) = engine.run([Job(token_ids=tokens, score_prompt=True)])
        (hidden,) = engine.final_hidden([tokens])
        with engine.head() as head:
            logprobs = log_softmax(head(hidden), -1)
        found = logprobs.gather(-1, tensor(tokens[1:])[:, None])[:, 0].tolist()
        assert found == pytest.approx((expected.prompt_logprobs or [])[1:], abs=1e-5)


@pytest.mark.parametrize("family", ["llama", real("opt")])
def test_attention_on_the_cpu_beside_a_gpu_stays_within_level_c(family: str, tmp_path: Path) -> None:
    folder, jobs, agreement = save_tiny(family, tmp_path), mix(31, 24), Agreement()
    policy = replace(POLICY, weights=(0, 1, 0), cache=(0, 1, 0), cpu_attention=1)
    with Engine.from_pretrained(str(folder), dtype="float32", device="cuda", policy=policy) as engine:
        results = engine.run(jobs)
    reference = Reference(folder)
    for job, result in zip(jobs, results, strict=True):
        agreement.add(job, result, reference)
    assert not agreement.failures, agreement.failures


COMPRESSED = [("w4-minmax", (0.2, 0.4, 0.4)), ("w4", (0.2, 0.4, 0.4)), ("w4-entropy", (0.3, 0.3, 0.4))]


@pytest.mark.parametrize(
    ("variant", "shares"),
    [slow(*each) for each in [*COMPRESSED, *(("w4-entropy", shares) for shares in ((0, 0, 1), (0, 1, 0)))]],
)
def test_compressed_weights_are_unpacked_on_a_gpu_to_the_bits_of_a_resident_model(
    variant: str, shares: Any, tmp_path: Path
) -> None:
    """Packed on the device, on the host and on disk; bits of the weights are those of a CPU."""
    folder, jobs = str(save_tiny("llama", tmp_path, num_layers=3)), mix(31, 4)
    options: dict[str, Any] = {"compression": variant, "offload_folder": tmp_path / "slabs", "dtype": "bfloat16"}
    # First, so that weights are fitted on the CPU: the simulated GPU has no gradients.
    with Engine.from_pretrained(folder, device="cpu", policy=POLICY, **options) as engine, engine.layer_weights(1) as weights:
        on_cpu = {name: weight.clone() for name, weight in weights.items()}
    with Engine.from_pretrained(folder, device="cuda", policy=POLICY, **options) as engine:
        expected = engine.run(jobs)
    with Engine.from_pretrained(folder, device="cuda", policy=replace(POLICY, weights=shares), **options) as engine:
        assert engine.run(jobs) == expected
        assert engine.run(jobs) == expected
        with engine.layer_weights(1) as weights:
            assert all(equal(weight.cpu(), on_cpu[name]) for name, weight in weights.items())


@pytest.mark.parametrize("shares", [(0, 0, 1), slow((0, 1, 0)), slow((0.5, 0, 0.5)), slow((0.3, 0.3, 0.4))])
def test_slabs_coded_without_loss_change_no_bit_on_a_gpu(shares: Any, tmp_path: Path) -> None:
    folder, jobs = str(save_tiny("llama", tmp_path, num_layers=3)), mix(31, 4)
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "offload_folder": tmp_path / "slabs"}
    with Engine.from_pretrained(folder, policy=POLICY, **options) as engine:
        expected = engine.run(jobs)
    policy = replace(POLICY, weights=shares, slab_coding="lossless")
    with Engine.from_pretrained(folder, policy=policy, **options) as engine:
        assert engine.run(jobs) == expected
        assert engine.run(jobs) == expected
        assert not shares[2] or (engine.describe().bits_per_weight_on_disk or 99) < 16
