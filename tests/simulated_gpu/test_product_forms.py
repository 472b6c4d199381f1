"""Forms of a GPU's matrix products: libraries give equal bits for equal products of one form, and promise nothing across forms.

So bits that depend neither on neighbours nor on placement need the same forms alone, together and in tiers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from flexgen_helm import Job, Policy
from tests.simulated_gpu.engines import JOBS, MIXED, POLICY, engine_for
from tests.simulated_gpu.gpu import Shapes
from tests.simulated_gpu.patches import simulated_gpu

pytestmark = pytest.mark.usefixtures("one_check")
BY_LIBRARY = pytest.mark.xfail(reason="attention is products of a library; a kernel with a fixed tile is still to come")


class Forms(NamedTuple):
    """The forms of products in linear layers, and in attention."""

    linear: set[Shapes]
    attention: set[Shapes]


@pytest.fixture(scope="module")
def forms_of(folder_of: Callable[[str], Path]) -> Callable[[str], Forms]:
    """The forms for the same jobs: alone, together, and together in three tiers."""

    def found(policy: Policy, runs: list[list[Job]]) -> Forms:
        with simulated_gpu() as gpu, engine_for(folder_of("llama"), policy) as engine:
            num_loading = len(gpu.log)
            for jobs in runs:
                engine.run(jobs, progress=False)
            products = [event for event in gpu.log[num_loading:] if event.size.shapes]
        attention = {event.size.shapes for event in products if event.site.startswith("attention/")}
        return Forms({event.size.shapes for event in products if not event.site.startswith("attention/")}, attention)

    forms = {
        "alone": found(POLICY, [[job] for job in JOBS]),
        "together": found(POLICY, [JOBS]),
        "in three tiers": found(MIXED, [JOBS]),
    }
    return forms.__getitem__


@pytest.mark.parametrize("how", ["together", "in three tiers"])
def test_linear_layers(how: str, forms_of: Callable[[str], Forms]) -> None:
    assert forms_of("alone").linear == forms_of(how).linear != set()


@BY_LIBRARY
@pytest.mark.parametrize("how", ["together", "in three tiers"])
def test_attention(how: str, forms_of: Callable[[str], Forms]) -> None:
    assert forms_of("alone").attention == forms_of(how).attention != set()
