"""torch's settings of precision: the engine's while it computes or checks, the user's otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from flexgen_helm import Engine
from flexgen_helm.rows.packed import PackedRows
from flexgen_helm.runtime import building
from flexgen_helm.runtime.load_model import load_and_check
from flexgen_helm.runtime.precise_products import ROUNDED_SUMS, PreciseProducts
from tests.jobs import fixed_mix
from tests.workbench import POLICY, Workbench

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def settings() -> dict[str, object]:
    return {"fp32": torch.get_float32_matmul_precision(), **{name: getattr(CUDA, name) for name in ROUNDED_SUMS}}


PRECISE = {"fp32": "highest", **dict.fromkeys(ROUNDED_SUMS, False)}
USERS = {"fp32": "medium", **dict.fromkeys(ROUNDED_SUMS, True)}


@pytest.fixture
def users_settings() -> Iterator[None]:
    before = settings()
    for values in (USERS, before):
        torch.set_float32_matmul_precision(str(values["fp32"]))
        for name in ROUNDED_SUMS:
            setattr(CUDA, name, values[name])
        if values is USERS:
            yield


@pytest.mark.usefixtures("users_settings")
def test_the_last_of_two_engines_restores_what_the_user_set() -> None:
    products = PreciseProducts()
    first, second = products.hold(), products.hold()
    found = []
    for step in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
        step()
        found.append(settings())
    assert found == [PRECISE] * 3
    second.__exit__(None, None, None)
    assert settings() == USERS


@pytest.mark.usefixtures("users_settings")
def test_an_error_restores_them_too() -> None:
    with pytest.raises(ValueError, match="torn"), PreciseProducts().hold():
        raise ValueError("torn")
    assert settings() == USERS


@pytest.mark.usefixtures("users_settings")
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has no such names")
def test_settings_by_newer_names_are_restored_by_these() -> None:
    CUDA.fp32_precision, CPU.fp32_precision = "tf32", "bf16"
    with PreciseProducts().hold():
        assert settings() == PRECISE
        assert (CUDA.fp32_precision, CPU.fp32_precision) == ("ieee", "ieee")
    assert (CUDA.fp32_precision, CPU.fp32_precision) == ("tf32", "bf16")


def noting(own: Callable[..., Any], seen: list[dict[str, object]]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        seen.append(settings())
        return own(*arguments)

    return call


@pytest.mark.usefixtures("users_settings")
def test_an_engine_checks_and_computes_with_its_own(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(building, "load_and_check", noting(load_and_check, seen))
    with Engine.from_pretrained(str(bench.folder("llama")), device="cpu", policy=POLICY) as engine:
        assert seen == [PRECISE]
        monkeypatch.setattr(PackedRows, "replay", noting(PackedRows.replay, seen))
        engine.run(fixed_mix(5, 2))
        assert len(seen) > 2
        assert all(found == PRECISE for found in seen)
        assert settings() == USERS
