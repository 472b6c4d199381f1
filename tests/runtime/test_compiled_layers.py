"""Compiled layers in the engine: the same bits where pieces run as they are, and levels A, B and C with torch's compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_helm import Engine
from flexgen_helm.errors import FlexGenError, UnsupportedModel
from flexgen_helm.model.compiled.layers import CompiledLayers, by_inductor
from flexgen_helm.runtime import building
from tests.jobs import fixed_mix
from tests.models import FAMILIES
from tests.reference import Agreement
from tests.workbench import NARROW, OWN_MEMORY, POLICY, Workbench

THREE_TIERS = replace(POLICY, weights=(0.4, 0.3, 0.3), cache=(0.5, 0.5, 0), cpu_attention=0)
Opened = Callable[..., AbstractContextManager[Engine]]
FAST = ("llama", "llama4_text", "mixtral", "deepseek_v3")
"""Grouped heads, a cache in the call, experts, and latent attention in two kinds of layers."""
ALL = [pytest.param(family, marks=() if family in FAST else pytest.mark.slow) for family in FAMILIES]
COMPILED = [
    pytest.param(family, dtype, marks=() if (family, dtype) == ("llama", "float32") else pytest.mark.slow)
    for family in ("llama", "gemma2", "gpt_oss", "mixtral")
    for dtype in ("float32", "bfloat16")
]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces run as torch runs them."""
    monkeypatch.setattr(building, "by_inductor", lambda: CompiledLayers(lambda graph: graph.forward))


@pytest.fixture
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All engines of a test share what the compiler makes."""
    compiled = by_inductor()
    monkeypatch.setattr(building, "by_inductor", lambda: compiled)


@pytest.fixture
def engine(bench: Workbench) -> Opened:
    """An engine with compiled layers."""

    @contextmanager
    def opened(family: str, **options: object) -> Iterator[Engine]:
        given = {"dtype": "float32", "device": "cpu", "policy": POLICY, **options}
        with Engine.from_pretrained(str(bench.folder(family)), compile_layers=True, **given) as made:  # type: ignore[arg-type]
            yield made

    return opened


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", ALL)
def test_cut_layers_have_the_bits_of_whole_ones(bench: Workbench, engine: Opened, family: str) -> None:
    jobs = fixed_mix(31, 10)
    with engine(family) as cut:
        assert cut.run(jobs) == bench.engine(family).run(jobs)
        assert cut.numerics.machine.compiled
        assert not bench.engine(family).numerics.machine.compiled


@pytest.mark.parametrize(("family", "dtype"), COMPILED)
@pytest.mark.usefixtures("compiled_once")
def test_all_levels_with_a_compiler(bench: Workbench, engine: Opened, tmp_path: Path, family: str, dtype: str) -> None:
    """A: three tiers. B: alone, in another order, in narrow blocks. C: plain transformers."""
    jobs = fixed_mix(33, 14)
    with engine(family, dtype=dtype) as compiled:
        assert compiled.self_check.bit_stable
        together = compiled.run(jobs)
        assert [compiled.run([job])[0] for job in jobs[::4]] == together[::4]
    with engine(family, dtype=dtype, policy=NARROW) as narrow:
        assert narrow.run(jobs[::-1]) == together[::-1]
    with engine(family, dtype=dtype, policy=THREE_TIERS, device=OWN_MEMORY, offload_folder=tmp_path) as tiers:
        assert tiers.run(jobs) == together
    if dtype == "float32":
        agreement = Agreement()
        for job, result in zip(jobs, together, strict=True):
            agreement.add(job, result, bench.reference(family))
        assert not agreement.failures, agreement.failures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"free_shapes": True}, r"fixed sizes\. Leave free_shapes or compile_layers out"),
        ({"rows": "single"}, r"packed rows only\. Leave rows or compile_layers out"),
    ],
)
def test_what_cannot_be_together_is_refused(engine: Opened, options: dict[str, object], message: str) -> None:
    with pytest.raises(FlexGenError, match=message), engine("llama", **options):
        pass


def test_a_model_for_single_rows_is_refused(engine: Opened) -> None:
    with pytest.raises(UnsupportedModel, match=r"cannot run with compiled layers: .*Leave compile_layers out"), engine("mpt"):
        pass
