"""Measurements of this machine: what they count is right, and everything that a plan needs is there. Never how fast it is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig

from flexgen_helm.attention import decode, sparse
from flexgen_helm.kv_cache.cache_format import PLAIN_CACHE, CacheFormat
from flexgen_helm.loading.dummy_weights import make_first_layers
from flexgen_helm.loading.source import ModelSource
from flexgen_helm.machine import disk_rate, matmul, rates, rounds
from flexgen_helm.machine.profile import LayerTime, Rate
from flexgen_helm.machine.profile_file import from_json, to_json
from flexgen_helm.machine.rounds import Rounds, median_of, rate_of, seconds_of
from flexgen_helm.machine.widened import Product
from flexgen_helm.memory.allocator import LARGE_TENSOR_MAPS
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.policy import measure, measure_attention, measure_products, measure_unpack
from flexgen_helm.policy.measure import measure_machine
from flexgen_helm.policy.measure_attention import Heads
from flexgen_helm.policy.measure_products import layer_matrices, product_rates
from flexgen_helm.policy.planner.signature import signature
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.policy.shapes_of_model import plain_formats, shapes_of
from flexgen_helm.rows import layer_times as layer_times_module
from flexgen_helm.rows.layer_times import MeasuredModel, layer_times
from flexgen_helm.types import Policy

OWN_MEMORY = Device(torch.device("cpu"), own_memory=True)
HEADS = Heads(4, 2, 16)


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures little, for a short time."""
    monkeypatch.setattr(rounds, "ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(rounds, "ROUNDS", 2)
    monkeypatch.setattr(layer_times_module, "ROUNDS", 2)
    monkeypatch.setattr(disk_rate, "SECONDS", 0.005)
    monkeypatch.setattr(disk_rate, "PIECE", 2**14)
    monkeypatch.setattr(disk_rate, "BUFFERS", 2)
    monkeypatch.setitem(rates.READ_BYTES, "cpu", 2**18)
    monkeypatch.setitem(measure_products.MOST_OPERATIONS, "cpu", 1e6)
    monkeypatch.setitem(measure_attention.DECODE_NUMBERS, "cpu", 2**17)
    monkeypatch.setitem(measure_unpack.NUM_TARGETS, "cpu", 2)
    monkeypatch.setattr(measure_unpack, "SHAPE", (128, 128))
    monkeypatch.setattr(measure_unpack, "FORMATS", ("w4", "w4-entropy"))
    monkeypatch.setattr(measure_unpack, "LOSSLESS_NUMBERS", 2**15)
    monkeypatch.setattr(measure_products, "faster_matmul", lambda device, dtype: "torch")
    monkeypatch.setattr(measure, "STANDARD_SHAPES", ((256, 64),))
    monkeypatch.setitem(measure.STANDARD_DTYPES, "cpu", (torch.bfloat16,))
    monkeypatch.setitem(measure.STANDARD_TOKENS, "cpu", (16, 64))


def test_median_and_spread_are_those_of_the_rounds() -> None:
    assert median_of([4.0, 1.0, 2.0]) == Rate(2.0, 1.5)
    assert rate_of(8, Rounds([1.0, 2.0, 4.0])) == Rate(4.0, 1.5)
    assert rate_of(8, Rounds([1.0, 2.0, 4.0], [1.0, 0.5, 1.0])) == Rate(4.0, 1.5, 8.0)


def test_rounds_are_timed_behind_calls_that_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only work moves: 1 ms a call, 2 s for the first one."""
    clock, lengths = 0.0, itertools.chain([2.0], itertools.repeat(1e-3))

    def work() -> None:
        nonlocal clock
        clock += next(lengths)

    monkeypatch.setattr(rounds, "ROUND_SECONDS", 0.03)
    monkeypatch.setattr(rounds, "ROUNDS", 5)
    monkeypatch.setattr("flexgen_helm.machine.rounds.time.perf_counter", lambda: clock)
    monkeypatch.setattr("flexgen_helm.machine.rounds.time.process_time", lambda: clock / 2)
    found = seconds_of(work, torch.device("cpu"), threads=4)
    assert found.wall == pytest.approx([1e-3] * rounds.ROUNDS)
    assert found.processor == pytest.approx([1e-3 / 8] * rounds.ROUNDS)
    assert clock > 2 + rounds.ROUNDS * 0.015


def whole(config: LlamaConfig | MixtralConfig) -> ModelSource:
    return ModelSource("model", None, config, None, torch.float32, torch.device("cpu"))


def llama(hidden: int = 64, layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=layers,
        vocab_size=300,
    )


def test_the_matrices_of_a_layer_are_those_by_which_a_token_is_multiplied() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2, vocab_size=300, **sizes)  # type: ignore[arg-type]
    layer = whole(config).empty.model.layers[0]
    attention, experts = [(64, 64), (64, 64), (32, 64), (32, 64)], [(192, 64), (64, 96)] * 2
    assert sorted(layer_matrices(layer, 2)) == sorted([*attention, (4, 64), *experts])
    assert layer_matrices(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))) == [(3, 8)]


@pytest.mark.parametrize("library", ["torch", "onednn", "widened_torch"])
def test_products_are_counted_with_two_operations_for_each_token_and_weight(
    monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    if library == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(measure_products, "faster_matmul", lambda device, dtype: library)
    monkeypatch.setattr(measure_products, "seconds_of", lambda work, device: (work(), Rounds([0.5]))[1])
    dtype = torch.bfloat16 if library == "widened_torch" else torch.float32
    multiplied = list[str]()

    def product_by(name: matmul.Matmul) -> Product:
        multiplied.append(name)
        return matmul.product_by(name)

    monkeypatch.setattr(measure_products, "product_by", product_by)
    found = list(product_rates(torch.device("cpu"), dtype, [(256, 64), (64, 32)], (3, 5)))
    assert multiplied == [library]
    assert {rate.tokens: rate.rate.value for rate in found} == {n: 2 * n * (256 * 64 + 64 * 32) / 0.5 for n in (3, 5)}
    assert {rate.packed for rate in found} == ({False, True} if library == "onednn" else {False})


def test_the_limit_of_a_run_is_that_of_the_library_that_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied = list[str]()

    def product_by(name: matmul.Matmul) -> Product:
        multiplied.append(name)
        return matmul.product_by(name)

    monkeypatch.setattr(rates, "faster_matmul", lambda device, dtype: "widened_torch")
    monkeypatch.setattr(rates, "product_by", product_by)
    monkeypatch.setattr(rates, "per_second", lambda work, device: (work(), 0.5)[1])
    found = rates.product_rate.__wrapped__(torch.device("cpu"), torch.bfloat16, 16, (64, 32))
    assert (found, multiplied) == (0.5 * 2 * 16 * 64 * 32, ["widened_torch"])


def test_layers_too_large_are_measured_with_fewer_outputs() -> None:
    bounded = measure_products._bounded([(8192, 1024), (100, 8192)], 64, 2 * 64 * 8192 * 1024 / 4)
    assert bounded[1] == (100, 8192)
    assert 1500 < bounded[0][0] < 2048


@pytest.mark.parametrize(("name", "form"), [("float32", PLAIN_CACHE), ("kv4", CacheFormat(4, 4))])
def test_the_bytes_of_a_decode_row_are_those_that_its_plan_reads(
    monkeypatch: pytest.MonkeyPatch, name: str, form: CacheFormat
) -> None:
    attend, read = decode.DecodeAttention.attend, list[int]()

    def counted(self: decode.DecodeAttention, plans, q, forms, **options):  # type: ignore[no-untyped-def]
        read.append(sum(plan.num_bytes(forms) for plan in plans))
        return attend(self, plans, q, forms, **options)

    monkeypatch.setattr(decode.DecodeAttention, "attend", counted)
    monkeypatch.setattr(measure_attention, "seconds_of", lambda work, device: (work(), Rounds([0.5]))[1])
    rate = measure_attention.decode_rate("device", CPU, name, (torch.float32, form), HEADS)
    assert rate.rate.value * 0.5 == read[0]
    assert (rate.place, rate.kind, rate.format) == ("device", "decode", name)


def test_the_operations_of_prompt_attention_are_those_of_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """160 tokens behind 1,024: 128 meet 9 chunks each, and 32 meet 10."""
    monkeypatch.setattr(measure_attention, "seconds_of", lambda work, device: (work(), Rounds([2.0]))[1])
    (rate,) = measure_attention.prefill_rates(CPU, {"float32": PLAIN_CACHE}, torch.float32, 160, HEADS)
    assert rate.rate.value == 4 * (128 * 9 + 32 * 10) * 128 * 4 * 16 / 2


@pytest.mark.parametrize("device", [CPU, OWN_MEMORY], ids=["cpu", "own memory"])
def test_everything_is_there_and_positive(device: Device, tmp_path: Path) -> None:
    said: list[str] = []
    profile = measure_machine(device, tmp_path, said.append)
    assert from_json(to_json(profile)) == profile  # which refuses rates of 0
    assert (profile.own_memory, profile.source, profile.threads) == (device.own_memory, "measured", torch.get_num_threads())
    assert (profile.host_to_device is not None) == (profile.device_to_host is not None) == device.own_memory
    assert profile.disk_read is not None
    assert profile.disk_write is not None
    places = {"device", "host"} if device.own_memory else {"device"}
    decode = {(rate.place, rate.format) for rate in profile.attention if rate.kind == "decode"}
    forms = ["bfloat16", "bfloat16s10", "kv4", "kv4s10"]
    assert decode == {(place, form) for place in places for form in forms}
    assert [rate.format for rate in profile.attention if rate.kind == "prefill"] == forms
    assert {rate.tokens for rate in profile.products} == {16, 64}
    unpacked = {(rate.place, rate.format) for rate in profile.unpack}
    on_host = {("host", "w4-entropy"), ("host", "lossless")}
    in_one_step = {("device", "lossless")}
    assert unpacked == {("device", "w4"), ("device", "w4-entropy"), *(on_host if device.own_memory else in_one_step)}
    assert profile.operation_seconds > 0
    assert all(profile.memory[tier] > 0 for tier in ("device", "host", "disk"))
    assert "matrix products in bfloat16" in said
    assert not list(tmp_path.glob("rate_*"))


def times(config: LlamaConfig, size: int, tokens: int, device: Device = CPU) -> list[LayerTime]:
    policy = resolved(Policy(gpu_batch_size=size, gpu_batch_tokens=tokens), device)
    model = make_first_layers(config, dtype=torch.float32, device=torch.device("cpu"))
    return list(layer_times(MeasuredModel(RecordedModel(model), "m", [0] * config.num_hidden_layers), policy, device))


@pytest.mark.parametrize("device", [CPU, OWN_MEMORY], ids=["cpu", "own memory"])
def test_layers_are_timed_for_both_rows(device: Device) -> None:
    small, large = times(llama(), 16, 16, device), times(llama(256), 16, 256, device)
    assert [(time.kind, time.tokens, time.model, time.dtype) for time in large[:2]] == [
        ("prefill", 256, "m", "float32"),
        ("decode", 16, "m", "float32"),
    ]
    assert [time.tokens for time in small[:2]] == [16, 16]
    assert all(min(time.seconds, time.record_seconds, time.next_seconds) > 0 for time in small + large)
    forms = [(time.packed, time.mapped) for time in large[::2]]
    assert forms in ([(False, False), (False, True)], [(False, False), (False, True), (True, False)])
    assert not device.own_memory or len(forms) == 2


def test_large_tensors_are_mapped_while_that_form_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, time_row = list[bool](), layer_times_module._time_row

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(LARGE_TENSOR_MAPS._users > 0)
        return time_row(*arguments, **options)

    monkeypatch.setattr(layer_times_module, "_time_row", watched)
    assert [time.mapped for time in times(llama(), 16, 16)] == seen
    assert any(seen)


def signed(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> str:
    model = ModelSource("model", None, config, None, dtype, torch.device("cpu")).empty
    return signature(shapes_of(model, plain_formats(model), dtype))


def test_a_signature_names_what_decides_a_layers_time() -> None:
    # 64 x 64 + 2 x 32 x 64 + 64 x 64 of attention, 3 x 192 x 64 of the MLP and 2 norms are 49,280 elements, padded to pages.
    assert signed(llama()) == signed(llama(layers=5)) == "64 4/2x16 640 0.0502M"
    assert signed(llama(128)) != signed(llama())
    one, two = (llama(256) for _ in range(2))
    two.num_key_value_heads = 4
    assert signed(one) != signed(two)


@pytest.mark.parametrize(
    ("name", "form"), [("float32s10", CacheFormat(sparsity=10)), ("kv4s10", CacheFormat(4, 4, sparsity=10))]
)
def test_sparse_prompts_are_measured_by_the_keys_of_earlier_chunks(
    monkeypatch: pytest.MonkeyPatch, name: str, form: CacheFormat
) -> None:
    """160 tokens behind 1,024: 128 meet 8 earlier chunks each, and 32 meet 9; a query's own chunk takes its dense time."""
    chosen, seconds = list[torch.Size](), iter([2.0, 6.0])
    choose = sparse._choose

    def counted(table: torch.Tensor, percent: int) -> torch.Tensor:
        chosen.append(table.shape)
        assert percent == 10
        return choose(table, percent)

    monkeypatch.setattr(sparse, "_choose", counted)
    monkeypatch.setattr(measure_attention, "seconds_of", lambda work, device: (work(), Rounds([next(seconds)]))[1])
    forms = {"float32": PLAIN_CACHE, name: form}
    dense, found = measure_attention.prefill_rates(CPU, forms, torch.float32, 160, HEADS)
    pairs, own = (128 * 9 + 32 * 10) * 128, 160 * 128
    assert dense.rate.value == 4 * pairs * 4 * 16 / 2
    assert (found.kind, found.format) == ("prefill", name)
    assert found.rate.value == pytest.approx(4 * (pairs - own) * 4 * 16 / (6 - 2 * own / pairs))
    assert chosen == [(160, 9, 4, 128)]


def test_keys_that_are_read_in_full_never_take_longer_than_others() -> None:
    """Else a slow round of dense attention would leave no time for sparse attention."""
    found = measure_attention._without(Rounds([1.0, 2.0], [1.0]), Rounds([50.0], [50.0]), 0.25)
    assert found == Rounds([0.75, 1.5], [0.75])
