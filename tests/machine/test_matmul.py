"""Libraries of matrix products: the choice between them, and oneDNN's products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.machine import matmul
from flexgen_helm.machine.matmul import Matmul, faster_matmul, onednn_linear, packed
from flexgen_helm.machine.widened import Product
from flexgen_helm.model.linear import _same_bits

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """What a measurement finds; each adds to "calls". The cache folder is empty."""
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path))
    found = {"torch": 2.0, "onednn": 1.0, "calls": 0.0}

    def measure(dtype: torch.dtype) -> dict[str, float]:
        found["calls"] += 1
        return {name: found[name] for name in ("torch", "onednn")}

    monkeypatch.setattr(matmul, "measure_products", measure)
    monkeypatch.setattr(matmul, "_onednn_serves", lambda dtype: True)
    return found


@pytest.mark.parametrize(("onednn", "chosen"), [(1.0, "onednn"), (2.1, "onednn"), (2.3, "torch")])
def test_the_faster_library_is_measured_once(seconds: dict[str, float], onednn: float, chosen: str) -> None:
    seconds["onednn"] = onednn
    assert [faster_matmul(CPU, torch.float32) for _ in range(2)] == [chosen] * 2
    assert seconds["calls"] == 1
    faster_matmul(CPU, torch.bfloat16)
    assert seconds["calls"] == 2


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"torch": 9.0, "widened_torch": 5.9, "widened_onednn": 5.9}, "widened_torch"),
        ({"torch": 9.0, "widened_torch": 5.9, "widened_onednn": 5.4}, "widened_torch"),
        ({"torch": 9.0, "widened_torch": 5.9, "widened_onednn": 5.3}, "widened_onednn"),
        ({"torch": 9.0, "widened_torch": 6.5, "widened_onednn": 5.8}, "widened_onednn"),
        ({"torch": 9.0, "widened_torch": 5.9}, "widened_torch"),
        ({"torch": 9.0, "widened_torch": 6.1, "widened_onednn": 6.1}, "torch"),
        ({"torch": 9.0, "onednn": 8.0, "widened_torch": 5.9, "widened_onednn": 5.9}, "onednn"),
        ({"torch": 5.0, "onednn": 3.0, "widened_torch": 16.0, "widened_onednn": 16.0}, "onednn"),
        ({"torch": 9.0}, "torch"),
    ],
)
def test_products_are_widened_where_that_is_faster_by_far(times: dict[str, float], chosen: str) -> None:
    assert matmul.chosen_of(times) == chosen


def test_what_an_earlier_version_measured_of_16_bits_is_measured_again(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(matmul, "WIDENED_DTYPES", ())
        for dtype in DTYPES:
            faster_matmul(CPU, dtype)
    assert seconds["calls"] == 3
    for dtype in DTYPES:
        faster_matmul(CPU, dtype)
    assert seconds["calls"] == 5


def test_it_is_measured_again_on_another_machine_and_where_the_file_is_torn(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faster_matmul(CPU, torch.float32)
    for file in (tmp_path / "matmul").iterdir():
        file.write_text(file.read_text()[:-9])
    faster_matmul(CPU, torch.float32)
    assert seconds["calls"] == 2
    monkeypatch.setattr(matmul, "machine_identity", lambda device: {"processor": "another"})
    faster_matmul(CPU, torch.float32)
    assert seconds["calls"] == 3


def test_of_two_processes_that_measure_at_once_the_first_decides(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines of one process must agree by a bit, though another process finds the other library faster meanwhile."""
    measure = matmul.measure_products

    def overtaken(dtype: torch.dtype) -> dict[str, float]:
        monkeypatch.setattr(matmul, "measure_products", measure)
        assert faster_matmul(CPU, dtype) == "onednn"
        return {"torch": 1.0, "onednn": 2.0}

    monkeypatch.setattr(matmul, "measure_products", overtaken)
    assert [faster_matmul(CPU, torch.float32) for _ in range(2)] == ["onednn"] * 2


def test_a_gpu_and_dtypes_that_onednn_does_not_serve_are_left_to_torch(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert faster_matmul(torch.device("cuda"), torch.float32) == "torch"
    assert faster_matmul(torch.device("cuda"), torch.bfloat16) == "torch"
    monkeypatch.setattr(matmul, "_onednn_serves", lambda dtype: False)
    assert faster_matmul(CPU, torch.float64) == "torch"
    assert seconds["calls"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_measured(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "MEASURED_TOKENS", (16,))
    found = matmul.measure_products(dtype)
    assert set(found) == set(matmul.serving(dtype)) >= {"torch", *(("widened_torch",) if dtype == torch.bfloat16 else ())}
    assert all(0 < value < 1 for value in found.values())


def test_a_library_without_hope_is_not_measured_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only products move: by 3.1 s and by 1 s."""
    clock, calls = 0.0, {"torch": 0, "onednn": 0}

    def product(name: Matmul, seconds: float) -> Product:
        def multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            nonlocal clock
            clock += seconds
            calls[name] += 1
            return inputs

        return multiply

    monkeypatch.setattr(matmul, "PRODUCTS", {"torch": product("torch", 3.1), "onednn": product("onednn", 1.0)})
    monkeypatch.setattr(matmul, "MEASURED_TOKENS", (16,))
    monkeypatch.setattr("flexgen_helm.machine.matmul.time.perf_counter", lambda: clock)
    assert matmul.measure_products(torch.float32) == pytest.approx({"torch": 3.1, "onednn": 1.0})
    assert calls == {"torch": matmul.FIRST_ROUNDS, "onednn": matmul.ROUNDS}


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.sampled_from([dtype for dtype in DTYPES if matmul._onednn_serves(dtype)]),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([(16,), (3, 16), (1, 64), (1,), (1, 1), (2,), (13,)]),
    st.booleans(),
    st.sampled_from([16, 64]),
)
def test_packed_weights_have_the_bits_of_unpacked_ones(
    dtype: torch.dtype, outputs: int, inputs: int, tokens: tuple[int, ...], biased: bool, hint: int
) -> None:
    chance = torch.Generator().manual_seed(outputs * inputs)
    x, weight = (torch.randn(*shape, inputs, generator=chance).to(dtype) for shape in (tokens, (outputs,)))
    bias = torch.randn(outputs, generator=chance).to(dtype) if biased else None
    found = onednn_linear(x, weight, bias)
    count = x[..., 0].numel()
    if _same_bits(weight, count):  # what is asked before anything is packed
        assert torch.equal(found, onednn_linear(x, packed(weight, hint), bias))
    assert found.shape == (*tokens, outputs)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # The rounding of a sum of `inputs` products and of the output, relative to the sum of magnitudes.
    bound = x.double().abs() @ weight.double().abs().T * torch.finfo(torch.float32).eps * inputs
    bound += expected.abs() * 2 * torch.finfo(dtype).eps + 1e-6
    assert bool(((found.double() - expected).abs() <= bound).all())
