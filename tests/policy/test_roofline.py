"""What a run is judged by: sizes against the config's own numbers, the bound against its definition."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from flexgen_helm import Engine, Job
from flexgen_helm.errors import FlexGenError
from flexgen_helm.machine import disk_rate
from flexgen_helm.machine import rates as module
from flexgen_helm.machine.disk_rate import disk_rates
from flexgen_helm.machine.rates import Rates, measure_rates
from flexgen_helm.policy.roofline import LayerSizes, layer_sizes, sweep_seconds, with_limit
from flexgen_helm.run_stats import RunStats, SweepStats
from flexgen_helm.types import LINKS
from tests.models import save_tiny

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ATTENTION, NORMS = 16 * (16 + 8 + 8 + 16), 2 * 16


def layers_of(config: LlamaConfig | MixtralConfig) -> list[nn.Module]:
    return list(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model.layers)


def test_a_token_meets_every_matrix_of_a_dense_layer() -> None:
    sizes = layer_sizes(layers_of(LlamaConfig(vocab_size=50, **SHAPE)), None)
    matrices = 3 * (ATTENTION + 3 * 16 * 40)
    assert sizes == LayerSizes(num_bytes=2 * (matrices + 3 * NORMS), active_weights=matrices)


def test_a_token_meets_only_its_experts() -> None:
    layers = layers_of(MixtralConfig(vocab_size=50, num_local_experts=4, num_experts_per_tok=2, **SHAPE))
    router, expert = 16 * 4, 3 * 16 * 40
    sizes = layer_sizes(layers, 2)
    assert sizes is not None
    assert sizes.active_weights == 3 * (ATTENTION + router + 2 * expert)
    assert sizes.num_bytes == 2 * 3 * (ATTENTION + NORMS + router + 4 * expert)
    assert layer_sizes(layers, None) is None


def test_the_head_and_what_is_streamed_count_too() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=50, **SHAPE), dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    sizes = layer_sizes(model.model.layers, None, head, from_disk=5, to_device=12)
    assert sizes is not None
    matrices = 3 * (ATTENTION + 3 * 16 * 40)
    assert (sizes.num_bytes, sizes.head_weights) == (2 * (matrices + 3 * NORMS + 50 * 16), 50 * 16)
    assert (sizes.from_disk, sizes.to_device) == (5, 12)


def test_a_sweep_takes_as_long_as_its_slowest_resource() -> None:
    """A prefill and two decode sweeps, each term of the formula by hand: once products are the slowest, once the CPU."""
    sizes = LayerSizes(1000, 500, head_weights=50, from_disk=200, to_device=500)
    rates = Rates(2e5, 1e5, 1e4, host_to_device=100, device_to_host=50, disk_read=80, disk_write=20, cpu_attention=200)
    prefill = SweepStats(0, 9, 2000, 0, 4, {"device_to_host": 40, "disk_write": 10}, {}, {})
    moved, weights = {"cpu_attention": 1800, "disk_read": 550, "host_to_device": 100}, {"disk_read": 400}
    decode = SweepStats(9, 9, 0, 4, 4, moved, weights, {})
    assert sweep_seconds(prefill, sizes, rates) == {
        "products": pytest.approx(2 * 500 * 2000 / 2e5 + 2 * 50 * 4 / 1e5),
        "read": 1000 / 1e4,
        "host_to_device": 500 / 100,
        "device_to_host": 40 / 50,
        "disk_read": 200 / 80,
        "disk_write": 10 / 20,
        "cpu_attention": 0,
    }
    seconds = sweep_seconds(decode, sizes, rates)
    assert seconds["products"] == pytest.approx(2 * (500 + 50) * 4 / 1e5)
    assert seconds["disk_read"] == (200 + 150) / 80  # weights once, though they were read twice
    assert seconds["host_to_device"] == (500 + 100) / 100
    stats = RunStats(per_sweep=[prefill, decode, decode])
    stats = with_limit(stats, sizes, rates)
    assert stats.limit_seconds == pytest.approx(10.004 + 2 * 1800 / 200)
    assert [(sweep.limit_seconds, sweep.limited_by) for sweep in stats.per_sweep] == [
        (pytest.approx(10.004), "products"),
        *[(9, "cpu_attention")] * 2,
    ]
    assert stats.limit_unknown == ""
    assert stats.least_seconds["cpu_attention"] == 2 * 1800 / 200
    assert stats.least_seconds["products"] == pytest.approx(10.004 + 2 * 0.044)
    assert RunStats().limit_seconds is None


def of(seconds: float, share: float | None) -> SweepStats:
    """A sweep at a share of its limit."""
    limit = None if share is None else seconds * share
    return SweepStats(0, seconds, 1, 0, 0, limit_seconds=limit, limited_by=None if share is None else "read")


def test_a_record_says_of_each_sweep_how_far_from_its_limit_it_was() -> None:
    sweeps = [of(2, 0.5), of(4, 0.25), of(1, 0.75)]
    assert RunStats(per_sweep=sweeps).as_dict()["per_sweep"]["limit"] == {
        "median": 0.5,
        "worst": 0.25,
        "worst_sweep": 2,
        "quantiles": {"10%": 0.25, "25%": 0.25, "75%": 0.75, "90%": 0.75},
        "every": 1,
        "sweeps": [[2, 1, "read"], [4, 1, "read"], [1, 0.75, "read"]],
    }
    unknown = RunStats(per_sweep=[of(2, None)]).as_dict()
    assert (unknown["per_sweep"]["limit"], unknown["limit_unknown"]) == (None, "the machine's rates were not asked for")


def test_a_record_of_many_sweeps_stays_small() -> None:
    """Of 5,000 sweeps at 0.0001, 0.0002, ... of their limits, every 25th is listed, and quantiles are those of all."""
    stats = RunStats(per_sweep=[of(1 / 3, number / 10_000) for number in range(1, 5001)])
    found = stats.as_dict()["per_sweep"]["limit"]
    assert (found["every"], len(found["sweeps"]), found["sweeps"][1]) == (25, 200, [0.3333, 0.0008667, "read"])
    assert (found["median"], found["worst"], found["worst_sweep"]) == (pytest.approx(0.25, abs=1e-3), 0.0001, 1)
    assert found["quantiles"] == pytest.approx({"10%": 0.05, "25%": 0.125, "75%": 0.375, "90%": 0.45}, abs=1e-3)
    assert len(json.dumps(found)) < 8000


def test_without_a_memory_of_its_own_the_device_has_no_link() -> None:
    sizes, rates = LayerSizes(1000, 500, from_disk=200), Rates(1e5, 1e5, 1e4, host_to_device=1, disk_read=100)
    seconds = sweep_seconds(SweepStats(0, 1, 0, 1, 1, {}, {}, {}), sizes, rates)
    assert (seconds["host_to_device"], seconds["disk_read"], max(seconds, key=seconds.__getitem__)) == (0, 2, "disk_read")


@pytest.mark.parametrize(
    ("tflops", "link", "disk", "behind_link", "behind_disk"),
    [(30, 12.5, 2, 2_400, 15_000), (140, 25, 6.5, 5_600, 21_538), (220, 25, 6.5, 8_800, 33_846), (550, 52, 13, 10_577, 42_308)],
    ids=["T4", "RTX 4090", "A100", "H100"],
)
def test_weights_are_hidden_from_the_break_even_block_on(
    tflops: float, link: float, disk: float, behind_link: int, behind_disk: int
) -> None:
    """FLOP/s x bytes per weight / (2 x bytes/s) tokens: published table of machines, 16-bit weights of any model."""
    weights = 30 * 10**9
    rates = Rates(tflops * 1e12, 1e12, 1e15, host_to_device=link * 1e9, disk_read=disk * 1e9)
    for tokens, sizes, name in (
        (behind_link, LayerSizes(2 * weights, weights, to_device=2 * weights), "host_to_device"),
        (behind_disk, LayerSizes(2 * weights, weights, from_disk=2 * weights), "disk_read"),
    ):
        seconds = sweep_seconds(SweepStats(0, 1, tokens, 0, 0, {}, {}, {}), sizes, rates)
        assert seconds["products"] == pytest.approx(seconds[name], rel=1e-4)


@pytest.fixture
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measures little, for a short time, and leaves none of it to other tests."""
    kept = module.product_rate, module.read_rate, module.link_rates, module.cpu_attention_rate
    monkeypatch.setattr(module, "MEASURED_SECONDS", 0.01)
    monkeypatch.setitem(module.READ_BYTES, "cpu", 2**22)
    monkeypatch.setattr(module, "NUM_CACHES", 2)
    monkeypatch.setattr(disk_rate, "SECONDS", 0.005)
    monkeypatch.setattr(disk_rate, "PIECE", 2**14)
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()


@pytest.mark.usefixtures("_in_no_time")
def test_only_what_a_run_used_is_measured(tmp_path: Path) -> None:
    measure = partial(measure_rates, torch.device("cpu"), torch.float32, matrix=(1024, 1024), row_tokens=(64, 16))
    rates = measure(used=(), folder=tmp_path)
    assert 1e8 < rates.decode < 1e15
    assert 1e8 < rates.prefill < 1e15
    assert 1e8 < rates.read < 1e13
    links = ("host_to_device", "device_to_host", "disk_read", "disk_write", "cpu_attention")
    assert {getattr(rates, link) for link in links} == {math.inf}
    rates = measure(used=(*LINKS, "cpu_attention"), folder=tmp_path)
    assert all(0 < getattr(rates, link) < math.inf for link in links)  # how fast is the machine's affair
    assert not list(tmp_path.iterdir())


def test_what_is_measured_is_random() -> None:
    """A GPU clocks higher on equal numbers."""
    found = module.random_numbers((3, module.RANDOM_NUMBERS), torch.device("cpu"), torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[0], found[2])
    assert found[0].float().std() == pytest.approx(1, abs=0.01)
    assert found[0].float().mean() == pytest.approx(0, abs=0.01)


def test_less_memory_is_measured_where_an_engine_leaves_less(monkeypatch: pytest.MonkeyPatch) -> None:
    own, asked, room = module.random_numbers, list[int](), 300

    def on_a_full_device(shape: tuple[int, ...], *others: Any) -> torch.Tensor:
        asked.append(4 * shape[0])
        if asked[-1] > room:
            raise torch.OutOfMemoryError("no memory")
        return own(shape, *others)

    monkeypatch.setattr(module, "random_numbers", on_a_full_device)
    monkeypatch.setattr(module, "READ_BYTES", {"meta": 1024, "cpu": 128})
    assert module.much_memory(torch.device("meta")).nbytes == 256
    assert asked == [1024, 512, 256]
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        module.much_memory(torch.device("meta"))
    assert asked[3:] == [1024, 512, 256, 128]


def test_a_disk_without_space_is_said(tmp_path: Path) -> None:
    with pytest.raises(FlexGenError, match="could not be measured"):
        disk_rates(tmp_path / "gone")


def test_a_disk_is_measured_without_a_file_that_a_killed_process_would_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_rate, "SECONDS", 0.005)
    monkeypatch.setattr(disk_rate, "PIECE", 2**14)
    (tmp_path / "unit_00000.slab").write_bytes(b"small")
    rate, seen, read = disk_rate._rate, [], []

    def watched(descriptor: int, *rest: Any) -> float:
        seen.append([path.name for path in tmp_path.iterdir()])
        read.append(os.fstat(descriptor).st_size)
        return rate(descriptor, *rest)

    monkeypatch.setattr(disk_rate, "_rate", watched)
    assert all(found > 0 for found in disk_rates(tmp_path))
    assert seen == [["unit_00000.slab"]] * 2
    assert read == [0, disk_rate.SCRATCH_PIECES * 2**14]  # what was written is larger than the slab
    (tmp_path / "unit_00000.slab").write_bytes(bytes(2**20))
    disk_rates(tmp_path)
    assert read[2:] == [0, 2**20]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_no_run_is_faster_than_its_limit(family: str, tmp_path: Path) -> None:
    with Engine.from_pretrained(str(save_tiny(family, tmp_path))) as engine:
        assert engine.with_limit(engine.stats).roofline_efficiency is None
        engine.run([Job(token_ids=range(3, 40), max_new_tokens=4)])
        share = engine.with_limit(engine.stats).roofline_efficiency
        assert share is not None
        assert 0 < share < 1
        limits = engine.with_limit(engine.stats).as_dict()["per_sweep"]["limit"]
        assert len(limits["sweeps"]) == engine.stats.sweeps
        assert 0 < limits["worst"] <= limits["median"] < 1
        info = engine.describe()
        assert info.bits_per_weight == info.bits_per_cache_element == 32
        assert info.numerics == engine.numerics
        files = sum(path.stat().st_size for path in (tmp_path / family).glob("*.safetensors"))
        assert info.weight_bytes["device"] == pytest.approx(files, rel=0.05)
