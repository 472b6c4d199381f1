"""Engines in every placement on the simulated GPU: nothing unordered, answers of the CPU, bits of all on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from flexgen_helm import Policy
from flexgen_helm.types import Result
from tests.jobs import fixed_mix
from tests.models import save_tiny
from tests.simulated_gpu.engines import MIXED, NUM_LAYERS, POLICY, THIRDS, answers
from tests.simulated_gpu.patches import simulated_gpu

PLACEMENTS = {
    "device": POLICY,
    "weights on the host": replace(POLICY, weights=(0, 1, 0)),
    "weights on disk": replace(POLICY, weights=(0, 0, 1)),
    "weights on three tiers": replace(POLICY, weights=THIRDS, prefetch=2),
    "K/V on the host": replace(POLICY, cache=(0, 1, 0), cpu_attention=0),
    "K/V on the host, where the CPU attends": replace(POLICY, cache=(0, 1, 0), cpu_attention=1),
    "K/V on three tiers, half on the CPU": replace(POLICY, cache=(0.3, 0.4, 0.3), cpu_attention=0.5),
    "K/V on disk": replace(POLICY, cache=(0, 0, 1), cpu_attention=0),
    "hidden states on the host": replace(POLICY, hidden=(0, 1, 0)),
    "hidden states on three tiers": replace(POLICY, hidden=(0.3, 0.4, 0.3)),
    "all on three tiers": MIXED,
    "FlexGen's": replace(POLICY, weights=(0.2, 0.8, 0), cache=(0, 1, 0), hidden=(0, 1, 0), cpu_attention=1),
}
FAMILIES = ("llama", "opt", "mixtral", "gemma2")
FAST = {("llama", "device", True), ("llama", "FlexGen's", True), ("gemma2", "all on three tiers", False)}
"""Together they take every path: each tier, both places of attention, both executors."""
LEVEL_C = 1e-5
"""Of tiny models in fp32, whose log-probabilities both sides compute in other orders of sums."""
MANY_JOBS = fixed_mix(31, 24)
Expected = Callable[..., list[Result]]
"""Of a family, a device and the number of jobs."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def folder(family: str) -> Path:
        num_layers = None if family == "gemma2" else NUM_LAYERS  # whose layers differ: it has four
        return save_tiny(family, tmp_path_factory.mktemp(family), num_layers=num_layers)

    return folder


@pytest.fixture(scope="module")
def expected(folder_of: Callable[[str], Path]) -> Expected:
    """The answers of a family, on the CPU or with everything on the device."""

    @cache
    def found(family: str, device: str, num_jobs: int) -> list[Result]:
        return answers(folder_of(family), POLICY, MANY_JOBS[:num_jobs], device=device)

    return found


def cases() -> list[object]:
    """Families in placements with overlap and without; all but a few are slow."""
    every = [(family, name, overlap) for family in FAMILIES for name in PLACEMENTS for overlap in (True, False)]
    return [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in every]


def assert_close(found: list[Result], expected: list[Result]) -> None:
    """Equal tokens, and log-probabilities of level C."""
    for x, y in zip(found, expected, strict=True):
        assert [c.token_ids for c in x.completions] == [c.token_ids for c in y.completions]
        for c, d in zip(x.completions, y.completions, strict=True):
            assert c.logprobs == pytest.approx(d.logprobs, rel=0, abs=LEVEL_C)
        assert (x.prompt_logprobs is None) == (y.prompt_logprobs is None)
        assert x.prompt_logprobs is None or x.prompt_logprobs == pytest.approx(y.prompt_logprobs, rel=0, abs=LEVEL_C)


def attends_on_device(policy: Policy) -> bool:
    return not (policy.cache[1] and policy.cpu_attention)


@pytest.mark.parametrize(("family", "name", "overlap"), cases())
def test_a_placement(family: str, name: str, overlap: bool, folder_of: Callable[[str], Path], expected: Expected) -> None:
    policy = replace(PLACEMENTS[name], overlap=overlap)
    num_jobs = 6 if (family, name, overlap) in FAST else 24
    on_cpu = expected(family, "cpu", num_jobs)
    with simulated_gpu() as gpu:
        on_device = expected(family, "cuda", num_jobs) if attends_on_device(policy) else None
        found = answers(folder_of(family), policy, MANY_JOBS[:num_jobs])
    assert not gpu.faults, "\n".join(gpu.faults)
    assert_close(found, on_cpu)
    if on_device is not None:
        assert found == on_device
