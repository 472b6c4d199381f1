"""Products of 16 bits in float32 in the engine: levels A, B and C, whatever this machine would choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexgen_helm import Engine, Job
from flexgen_helm.machine import matmul, widened
from flexgen_helm.machine.matmul import WIDENED, Matmul, faster_matmul
from flexgen_helm.model import recorder
from tests.dimensions import VOCAB_SIZE
from tests.jobs import fixed_mix, random_tokens
from tests.workbench import NARROW, OWN_MEMORY, POLICY, Workbench

LIBRARIES = [name for name in WIDENED if name in matmul.serving(torch.bfloat16)]
THREE_TIERS = replace(POLICY, weights=(0.4, 0.3, 0.3), cache=(0.5, 0.5, 0), cpu_attention=0)
FAMILIES = ("llama", "gpt2", "mixtral", "opt", "gemma2", "gpt_oss", "deepseek_v3", "falcon_h1")
"""Rotation, Conv1D, experts, linear layers with bias, softcap, experts of transposed weights, latent attention, single rows."""
CASES = [(family, dtype) for family in FAMILIES for dtype in ("bfloat16", "float16")]
PROMPTS = [random_tokens(seed, 1 + 5 * seed) for seed in range(12)]
Opened = Callable[..., AbstractContextManager[Engine]]


@pytest.fixture
def engine(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """An engine that multiplies 16 bits by a library; matrices are cut into several slices."""
    monkeypatch.setattr(widened, "slice_features", lambda num_inputs: 32)

    @contextmanager
    def opened(family: str, library: Matmul, **options: object) -> Iterator[Engine]:
        def chosen(device: torch.device, dtype: torch.dtype) -> Matmul:
            return faster_matmul(device, dtype) if dtype == torch.float32 else library

        given = {"device": "cpu", "dtype": "bfloat16", "policy": POLICY, **options}
        with monkeypatch.context() as patch:
            patch.setattr(recorder, "faster_matmul", chosen)
            with Engine.from_pretrained(str(bench.folder(family)), **given) as made:  # type: ignore[arg-type]
                assert made.numerics.machine.matmul == library
                yield made

    return opened


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_no_bit_depends_on_neighbours_order_or_tiers(
    engine: Opened, tmp_path: Path, family: str, dtype: str, library: Matmul
) -> None:
    jobs = fixed_mix(41, 14)
    with engine(family, library, dtype=dtype) as plain:
        assert plain.self_check.bit_stable
        together = plain.run(jobs)
        assert [plain.run([job])[0] for job in jobs[::4]] == together[::4]
        sizes = plain.numerics.rows
    with engine(family, library, dtype=dtype, policy=NARROW, order="row") as narrow:
        assert narrow.run(jobs[::-1]) == together[::-1]
    tiers = THREE_TIERS if sizes.kind == "packed" else replace(THREE_TIERS, cache=(1, 0, 0))
    with engine(family, library, dtype=dtype, policy=tiers, device=OWN_MEMORY, offload_folder=tmp_path) as tiered:
        assert tiered.run(jobs) == together


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("family", ["mistral", pytest.param("opt", marks=pytest.mark.slow)])
def test_answers_are_as_close_to_float32_as_those_of_transformers(
    bench: Workbench, engine: Opened, family: str, library: Matmul
) -> None:
    """The tolerances of `test_engine_numerics.test_bfloat16_is_as_close_to_float32_as_transformers_is`."""
    exact, peer = (log_probs(bench, family, dtype) for dtype in ("float32", "bfloat16"))
    with engine(family, library) as plain:
        ours = of_engine(plain)
    assert divergence(exact, ours) < 2 * divergence(exact, peer) + 1e-4
    assert divergence(peer, ours) < divergence(exact, peer) + divergence(exact, ours)
    assert (ours.argmax(-1) == exact.argmax(-1)).float().mean() > 0.7


def test_the_library_is_part_of_the_numerics(engine: Opened) -> None:
    """So caches and baselines of another library are not mixed with these."""
    with engine("llama", "torch") as torchs, engine("llama", "widened_torch") as ours:
        assert replace(torchs.numerics, machine=ours.numerics.machine) == ours.numerics != torchs.numerics


def log_probs(bench: Workbench, family: str, dtype: str) -> torch.Tensor:
    """What follows each prompt by transformers' own forward: log-probabilities ``[prompts, V]``."""
    return torch.stack([bench.reference(family, dtype=dtype).log_probs(ids)[-1] for ids in PROMPTS])


def of_engine(engine: Engine) -> torch.Tensor:
    """The same by an engine."""
    found = torch.empty(len(PROMPTS), VOCAB_SIZE)
    jobs = [Job(token_ids=ids, max_new_tokens=1, top_logprobs=VOCAB_SIZE) for ids in PROMPTS]
    for row, result in zip(found, engine.run(jobs), strict=True):
        candidates = result.completions[0].top_logprobs[0]
        row[[candidate.token_id for candidate in candidates]] = torch.tensor([c.logprob for c in candidates])
    return found


def divergence(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Mean over rows of the divergence of ``got`` from ``expected``, both log-probabilities, in nats."""
    return float((expected.exp() * (expected - got)).sum(-1).mean())
