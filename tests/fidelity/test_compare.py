"""Two engines side by side, against plain computations on both models' logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from flexgen_helm import Engine, Policy
from flexgen_helm.errors import FlexGenError
from flexgen_helm.fidelity.compare import compare
from flexgen_helm.fidelity.windows import Window
from tests.jobs import random_tokens
from tests.text_models import save_llama
from tests.tiny_tokenizers import byte_level
from tests.workbench import NARROW, POLICY, Workbench

WINDOWS = [Window(tuple(random_tokens(seed, 10 + 9 * seed)), 1 + 3 * (seed % 2), seed) for seed in range(5)]
FAMILIES = ["llama", "lfm2"]
"""One in packed rows, one in single rows."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def changed(bench: Workbench, family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a family with weights that are 3 % off."""
    model = AutoModelForCausalLM.from_pretrained(bench.folder(family))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.03 * torch.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("changed")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def candidate(changed: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(str(changed), device="cpu", policy=POLICY) as engine:
        yield engine


def by_transformers(folder: Path, dtype: str = "float32") -> Tensor:
    """Logits of all predictions that count, ``[N, vocab]``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([w.tokens])).logits[0, w.first - 1 : -1].float() for w in WINDOWS])


def by_engine(engine: Engine) -> Tensor:
    hidden = engine.final_hidden([window.tokens for window in WINDOWS])
    with engine.head() as head:
        return torch.cat([head(states[w.first - 1 :]) for w, states in zip(WINDOWS, hidden, strict=True)])


def plain_kl(reference: Tensor, candidate: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    p, q = (logits.double().log_softmax(-1) for logits in (reference, candidate))
    return np.asarray(kl_div(q, p, log_target=True, reduction="none").sum(-1))


def test_figures_are_those_of_transformers_logits(bench: Workbench, family: str, changed: Path, candidate: Engine) -> None:
    found = compare(bench.engine(family), candidate, WINDOWS)
    first, second = by_transformers(bench.folder(family)), by_transformers(changed)
    expected = plain_kl(first, second)
    assert expected.mean() > 1e-3
    np.testing.assert_allclose(found.kl, expected, rtol=1e-3, atol=1e-6)
    targets = torch.tensor([token for window in WINDOWS for token in window.targets])
    for nll, logits in ((found.nll_reference, first), (found.nll_candidate, second)):
        expected_nll = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
        np.testing.assert_allclose(nll, expected_nll.numpy(), atol=1e-3)
    assert found.agrees.mean() == pytest.approx(float((first.argmax(-1) == second.argmax(-1)).double().mean()), abs=0.02)


def test_figures_are_those_of_the_engines_logits(bench: Workbench, family: str) -> None:
    reference, rounded = bench.engine(family), bench.engine(family, dtype="bfloat16")
    found = compare(reference, rounded, WINDOWS)
    first, second = by_engine(reference), by_engine(rounded)
    np.testing.assert_allclose(found.kl, plain_kl(first, second), atol=1e-12)
    assert found.agrees.tolist() == (first.argmax(-1) == second.argmax(-1)).double().tolist()
    assert found.kl.mean() > 0


def test_an_engine_against_itself_is_exactly_zero(bench: Workbench, family: str) -> None:
    engine = bench.engine(family)
    found = compare(engine, engine, WINDOWS, block_tokens=40)
    assert not found.kl.any()
    assert not found.delta_p.any()
    assert found.agrees.all()


def test_weights_on_disk_and_small_blocks_change_no_bit(
    bench: Workbench, family: str, changed: Path, candidate: Engine, tmp_path: Path
) -> None:
    expected = compare(bench.engine(family), candidate, WINDOWS)
    policy = Policy(NARROW.gpu_batch_size, 1, gpu_batch_tokens=NARROW.gpu_batch_tokens, block_tokens=96, weights=(0, 0, 1))
    folders = {"reference": bench.folder(family), "candidate": changed}
    reference, other = (
        Engine.from_pretrained(str(folder), device="cpu", policy=policy, offload_folder=tmp_path / name)
        for name, folder in folders.items()
    )
    with reference, other:
        told: list[int] = []
        found = compare(reference, other, WINDOWS, block_tokens=50, on_block=told.append)
    for name in vars(expected):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert len(told) > 2
    assert told[-1] == len(found)


def test_other_vocabularies_are_refused(bench: Workbench, tmp_path: Path) -> None:
    large = save_llama(byte_level(), tmp_path / "large")
    with (
        Engine.from_pretrained(str(large), device="cpu", policy=POLICY) as other,
        pytest.raises(FlexGenError, match="vocabularies differ"),
    ):
        compare(bench.engine("llama"), other, WINDOWS)
