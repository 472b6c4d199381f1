"""Where decode rows attend: one value for all sequences on a GPU, from model, machine and limits, or from the user."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from flexgen_helm.errors import PolicyError
from flexgen_helm.loading.assembly import empty_model
from flexgen_helm.loading.named_configs import named_config
from flexgen_helm.policy.attention_place import AttentionPlace, attention_place
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import EMBEDDINGS, ModelShapes
from flexgen_helm.policy.shapes_of_model import plain_formats, shapes_of
from flexgen_helm.policy.space import Space
from flexgen_helm.types import ON_DEVICE, ON_HOST, Policy, ResolvedPolicy, Shares

GIB = 2**30
SIZES = ResolvedPolicy(gpu_batch_size=256, gpu_batch_tokens=4096)
DEVICE, HOST = (0.0, ON_DEVICE), (1.0, ON_HOST)
OPT, LLAMA = "facebook/opt-30b", "meta-llama/Llama-3.1-8B"


@functools.cache
def shapes(name: str, dtype: torch.dtype = torch.bfloat16) -> ModelShapes:
    config = named_config(name)
    assert config is not None
    model = empty_model("", config, dtype)
    return shapes_of(model, plain_formats(model), dtype)


def machine(device: float = 15, host: float = 120, *, is_gpu: bool = True) -> Space:
    return Space({"device": int(device * GIB), "host": int(host * GIB), "disk": 2000 * GIB}, True, is_gpu=is_gpu)


def place_of(place: AttentionPlace) -> tuple[float, Shares]:
    return place.cpu_attention, place.cache


def chosen(name: str = OPT, space: Space | None = None, sizes: ResolvedPolicy = SIZES, **fields: Any) -> tuple[float, Shares]:
    return place_of(attention_place(Policy(**fields), sizes, shapes(name), space or machine()))


@pytest.mark.parametrize(
    ("name", "space", "sizes", "expected", "reason"),
    [
        (OPT, machine(15), SIZES, HOST, "streamed, and K and V of 1,024 sequences do not fit on the device"),
        (OPT, machine(80), SIZES, DEVICE, None),  # the model is resident
        (LLAMA, machine(15), SIZES, HOST, "do not fit on the device"),
        (LLAMA, machine(15), replace(SIZES, gpu_batch_size=16), DEVICE, "K and V of 64 sequences fit on the device"),
        (OPT, machine(40, 12), SIZES, DEVICE, "on the host fewer than on the device"),
        (OPT, machine(1, 1), SIZES, DEVICE, None),  # no place: the plan refuses it, in words of its own
    ],
)
def test_streamed_models_attend_where_more_sequences_fit(
    name: str, space: Space, sizes: ResolvedPolicy, expected: tuple[float, Shares], reason: str | None
) -> None:
    found = attention_place(Policy(), sizes, shapes(name), space)
    assert place_of(found) == expected
    assert (found.reason is None) == (reason is None)
    assert (reason or "") in (found.reason or "")


def test_a_large_model_decodes_many_sequences_with_nothing_set() -> None:
    """Of 512 and 32 tokens. With K and V on the device ten fit, and each sweep takes as long."""
    space, counts = machine(15, 120), []
    for asked in (Policy(), Policy(cpu_attention=0)):
        place = attention_place(asked, SIZES, shapes(OPT), space)
        plan = MemoryPlan.of(shapes(OPT), replace(SIZES, cpu_attention=place.cpu_attention, cache=place.cache), space)
        room = sum(plan.cache.capacities(plan.left(space.available)).values())
        counts.append(room // (544 * shapes(OPT).cache_bytes_per_token))
        assert plan.weights.weight_bytes["disk"] == 0
    assert counts[0] >= 80
    assert counts[1] <= 12


@pytest.mark.parametrize(
    "fields", [{"weights": (0, 0, 1)}, {"weights": ON_DEVICE}, {"num_gpu_batches": 1}, {"block_tokens": 64}]
)
def test_what_may_change_no_bit_does_not_choose_the_place(fields: dict[str, Any]) -> None:
    sizes = replace(SIZES, **fields)
    assert chosen(sizes=sizes, **fields) == HOST
    assert chosen(space=machine(80), sizes=sizes, **fields) == DEVICE


def test_dtype_and_compression_do_not_choose_the_place() -> None:
    """Llama of 8 B takes 15 GiB in 16 bits, so that it is resident on 20 GiB; in 32 bits it is streamed there."""
    plain = shapes(LLAMA)
    quarter = {j: count // 4 for j, count in plain.bound_bytes.items()}
    stored = {**quarter, EMBEDDINGS: plain.stored_bytes[EMBEDDINGS]}
    compressed = replace(
        plain, stored_bytes=stored, carried_bytes=quarter, disk_bytes=quarter, is_coded=True, is_packed=True, kv_itemsize=1
    )
    assert compressed.at_16_bits() == plain.at_16_bits() == plain
    for sizes in (plain, compressed, shapes(LLAMA, torch.float32)):
        for device, expected in ((20, DEVICE), (15, HOST)):
            assert place_of(attention_place(Policy(), SIZES, sizes, machine(device))) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"cpu_attention": 1}, HOST),
        ({"cpu_attention": 0}, DEVICE),
        ({"cpu_attention": 0, "cache": (0.2, 0.4, 0.4)}, (0, (0.2, 0.4, 0.4))),
        ({"cpu_attention": 0, "cache": ON_HOST}, (0, ON_HOST)),
        ({"cpu_attention": 1, "cache": ON_DEVICE}, (1, ON_DEVICE)),  # nothing is on the host that the CPU could read
    ],
)
@pytest.mark.parametrize("device", [15, 80])
def test_a_user_names_the_place(fields: dict[str, Any], expected: tuple[float, Shares], device: int) -> None:
    assert chosen(space=machine(device), **fields) == expected


def test_shares_of_the_cache_follow_the_place_that_was_chosen() -> None:
    assert chosen(cache=ON_HOST) == HOST
    for cache in (ON_HOST, ON_DEVICE, (0.2, 0.4, 0.4)):
        assert chosen(space=machine(80), cache=cache) == (0, cache)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cpu_attention": 0.5}, "cpu_attention is 0.5, but on a GPU it is 0 or 1"),
        ({"cpu_attention": 1, "cache": (0.5, 0.5, 0)}, "lets the CPU attend to a part of K and V.*Set cache to"),
        ({"cpu_attention": 1, "cache": (0, 0.5, 0.5)}, "lets the CPU attend to a part of K and V.*Set cache to"),
        ({"cache": (0.5, 0.5, 0)}, "attention is on the CPU: weights are streamed.*set cpu_attention to 0"),
        ({"cache": (1, 0, 0)}, "attention is on the CPU: weights are streamed.*set cpu_attention to 0"),
    ],
)
def test_an_answer_never_depends_on_its_row_or_on_the_tier_of_a_page(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        chosen(**fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"cpu_attention": 0.5, "cache": (0.5, 0.5, 0)}, (0.5, (0.5, 0.5, 0))),
        ({"cpu_attention": 0.5}, (0.5, ON_DEVICE)),
        ({"cache": (0.5, 0.5, 0)}, (1, (0.5, 0.5, 0))),
        ({}, HOST),
    ],
)
def test_a_cpu_with_a_memory_of_its_own_takes_any_share(fields: dict[str, Any], expected: tuple[float, Shares]) -> None:
    assert chosen(space=machine(is_gpu=False), **fields) == expected
