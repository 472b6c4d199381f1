"""Engines in every placement on the simulated GPU: nothing unordered, answers of the CPU, bits of all on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from flexgen_helm.types import Result
from tests.jobs import fixed_mix
from tests.simulated_gpu.engines import MIXED, ON_HOST, POLICY, THIRDS, answers
from tests.simulated_gpu.patches import simulated_gpu

pytestmark = pytest.mark.usefixtures("one_check")
PLACEMENTS = {
    "device": POLICY,
    "weights on the host": replace(POLICY, weights=(0, 1, 0)),
    "weights on disk": replace(POLICY, weights=(0, 0, 1)),
    "weights on three tiers": replace(POLICY, weights=THIRDS, prefetch=2),
    "K/V on the host": replace(POLICY, cache=(0, 1, 0), cpu_attention=0),
    "K/V on the host, where the CPU attends": replace(POLICY, cache=(0, 1, 0), cpu_attention=1),
    "K/V on three tiers": replace(POLICY, cache=THIRDS, cpu_attention=0),
    "K/V on disk": replace(POLICY, cache=(0, 0, 1), cpu_attention=0),
    "hidden states on the host": replace(POLICY, hidden=(0, 1, 0)),
    "hidden states on three tiers": replace(POLICY, hidden=THIRDS),
    "all on three tiers": MIXED,
    "FlexGen's": ON_HOST,
}
FAMILIES = ("llama", "opt", "mixtral", "gemma2")
FAST = {("llama", "all on three tiers", True), ("opt", "FlexGen's", True)}
"""Together they take each tier and both places of attention."""
LEVEL_C = 1e-5
"""Of tiny models in fp32, whose log-probabilities both sides compute in other orders of sums."""
MANY_JOBS = fixed_mix(31, 24)
Expected = Callable[..., list[Result]]
"""Of a family, a device and the number of jobs."""


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


@pytest.mark.parametrize(("family", "name", "overlap"), cases())
def test_a_placement(family: str, name: str, overlap: bool, folder_of: Callable[[str], Path], expected: Expected) -> None:
    policy = replace(PLACEMENTS[name], overlap=overlap)
    num_jobs = 6 if (family, name, overlap) in FAST else 24
    on_cpu = expected(family, "cpu", num_jobs)
    with simulated_gpu() as gpu:
        on_device = expected(family, "cuda", num_jobs) if not policy.cpu_attention else None
        found = answers(folder_of(family), policy, MANY_JOBS[:num_jobs])
    assert not gpu.faults, "\n".join(gpu.faults)
    assert_close(found, on_cpu)
    if on_device is not None:
        assert found == on_device
