"""One, three and four stages with tiers, compression and shared prefixes on: answers are those of one process, bit by bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm import Engine, Job, Result
from flexgen_helm.processes import DRIVES
from tests.distributed.stages import pipeline
from tests.jobs import fixed_mix, random_tokens
from tests.models import save_tiny
from tests.workbench import NARROW, OWN_MEMORY

FAMILIES = {"llama": 5, "mistral": 6, "qwen2": 5, "mixtral": 5, "opt": 5, "gemma2": None}
"""Families, and their layers where the tiny model has fewer than the stages; 5 and 6 are not multiples of 3 and 4."""
PREFIX = random_tokens(71, 200)
"""Longer than a chunk of keys, so that pages are sealed and shared."""
LONG = [
    Job(token_ids=PREFIX + random_tokens(seed, 5 + 9 * seed), max_new_tokens=6, temperature=0.8 * (seed % 2), seed=seed)
    for seed in range(6)
]
SCORED = [Job(token_ids=PREFIX[:150] + random_tokens(91 + seed, 40), score_prompt=True) for seed in range(2)]
JOBS = [*fixed_mix(23, 14), *LONG, *SCORED]
TIERS = replace(NARROW, weights=(0.0, 0.5, 0.5), cache=(0.2, 0.4, 0.4), hidden=(0.0, 0.5, 0.5), cpu_attention=0.0)
OPTIONS: dict[str, Any] = {"device": OWN_MEMORY, "policy": TIERS, "dtype": "float32", "compression": "w4kv4s10"}


@pytest.fixture(scope="module", params=[1, 3, 4])
def drives(request: pytest.FixtureRequest) -> Iterator[str]:
    """Stages that meet once and make every engine of this file; gives what tells an engine to be divided."""
    with pipeline(request.param):
        yield os.environ.pop(DRIVES)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    return cache(lambda family: save_tiny(family, root, num_layers=FAMILIES[family]))


@pytest.fixture(scope="module")
def expected(folder_of: Callable[[str], Path]) -> Callable[[str], list[Result]]:
    """What one process answers."""
    return cache(lambda family: answers(folder_of(family)))


def answers(folder: Path) -> list[Result]:
    with Engine.from_pretrained(str(folder), **OPTIONS) as engine:
        found = engine.run(JOBS)
        assert engine.stats.prompt_tokens_computed < 0.75 * engine.stats.prompt_tokens_asked, "prefixes are not shared"
        return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_stages_answers_as_one_process(
    drives: str, family: str, folder_of: Callable[[str], Path], expected: Callable[[str], list[Result]]
) -> None:
    one = expected(family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DRIVES, drives)
        assert answers(folder_of(family)) == one
