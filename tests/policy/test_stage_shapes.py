"""Sizes of the stages of a pipeline, against smaller models and the whole one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import EMBEDDINGS, ModelShapes
from flexgen_helm.policy.shapes_of_model import plain_formats, shapes_of
from flexgen_helm.policy.space import Space
from flexgen_helm.policy.stages.balance import balanced, head_cost, layer_costs
from flexgen_helm.types import TIERS, ResolvedPolicy, Tier
from tests.policy.planner.made import KIB, shapes_with

SIZES = ("stored_bytes", "carried_bytes", "bound_bytes", "disk_bytes")
POLICY = ResolvedPolicy(gpu_batch_size=16, gpu_batch_tokens=64, block_tokens=64)


def llama(num_layers: int, *, tied: bool) -> ModelShapes:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return shapes_of(model, plain_formats(model), torch.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_a_last_stage_is_a_model_of_fewer_layers(tied: bool) -> None:
    whole, smaller = llama(7, tied=tied), llama(3, tied=tied)
    # Bytes of the embeddings are what slabs, which are padded, leave of the weights.
    stored = {**smaller.stored_bytes, EMBEDDINGS: whole.stored_bytes[EMBEDDINGS]}
    assert whole.of_layers(range(4, 7)) == dataclasses.replace(smaller, stored_bytes=stored, borders=(True, False))
    assert whole.of_layers(range(7)) == whole


@pytest.mark.parametrize("tied", [True, False])
def test_an_earlier_stage_has_the_embeddings_and_no_head(tied: bool) -> None:
    whole = llama(7, tied=tied)
    stage = whole.of_layers(range(1, 4))
    assert not stage.has_head
    assert not stage.has_own_head
    assert stage.stored_bytes == {
        EMBEDDINGS: whole.stored_bytes[EMBEDDINGS],
        **{i: whole.stored_bytes[i + 1] for i in range(3)},
    }


@pytest.mark.parametrize("head", [None, 24 * KIB])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_bytes_of_stages_add_up_to_the_models(stages: int, head: int | None) -> None:
    units = {j: (3 + j * j) * KIB for j in range(5)} | ({} if head is None else {5: head})
    products = {1: 17.0, 3: 5.0}
    sizes: dict[str, Any] = dict.fromkeys(SIZES[1:], units)
    whole = shapes_with(5, stored_bytes={EMBEDDINGS: 8 * KIB, **units}, layer_products=products, **sizes)
    found = [whole.of_layers(layers) for layers in balanced(layer_costs(whole), stages, last=head_cost(whole))]

    assert [each.has_head for each in found] == [False] * (stages - 1) + [True]
    assert [each.has_own_head for each in found] == [False] * (stages - 1) + [head is not None]
    assert sum(each.num_layers for each in found) == 5
    for name in SIZES[1:]:
        assert sum(sum(getattr(each, name).values()) for each in found) == sum(units.values())
    assert sum(each.total_bytes for each in found) == whole.total_bytes + (stages - 1) * 8 * KIB
    assert sum(each.cache_bytes_per_token for each in found) == whole.cache_bytes_per_token
    of_layers = [each.products_of(j) for each in found for j in range(each.num_layers)]
    assert of_layers == [whole.products_of(j) for j in range(5)]


def test_only_the_last_stage_has_room_for_logits() -> None:
    whole = shapes_with(4, head=4 * KIB)
    space = Space(dict.fromkeys(TIERS, 2**30), own_memory=True)
    first, last = (MemoryPlan.of(whole.of_layers(layers), POLICY, space) for layers in (range(2), range(2, 4)))
    # Three tensors of 16 positions by 128 tokens in fp32.
    assert (last.working_bytes - last.travel_bytes) - (first.working_bytes - first.travel_bytes) == 3 * 16 * 128 * 4


@pytest.mark.parametrize("own_memory", [True, False])
@pytest.mark.parametrize("lanes", [1, 3])
def test_rows_on_their_way_are_in_the_plan(own_memory: bool, lanes: int) -> None:
    """A row has a byte for each token and one for itself; a stage in the middle has them on both sides."""
    whole, space = shapes_with(6), Space(dict.fromkeys(TIERS, 2**30), own_memory)
    policy = dataclasses.replace(POLICY, num_lanes=lanes, weights=(0.0, 1.0, 0.0))
    alone, first, middle, last = (
        MemoryPlan.of(whole.of_layers(layers), policy, space) for layers in (range(6), range(2), range(2, 4), range(4, 6))
    )
    # 64 tokens of prompts and four rows of 16 that decode, of 32 elements in 16 bits, in each lane.
    sweeps = lanes * (64 + 4 * 16) * (32 * 2 + 1)
    frame = 8 + 64 * (32 * 2 + 1) + 1
    posted = 64 * frame
    assert [plan.travel_bytes for plan in (alone, first, middle, last)] == [0, sweeps, posted + 2 * sweeps, posted + sweeps]
    without = dataclasses.replace(middle, shapes=dataclasses.replace(middle.shapes, borders=(False, False)))
    tier: Tier = "host" if own_memory else "device"
    more = {name: count - without.running_with({})[name] for name, count in middle.running_with({}).items()}
    assert more == (
        {"device": middle.travel_bytes, "host": middle.travel_bytes, "disk": 0}
        if own_memory
        else {"host": middle.travel_bytes, "disk": 0}
    )
    free = dict.fromkeys(TIERS, 2**29)
    assert without.left(free)[tier] - middle.left(free)[tier] == middle.travel_bytes


def test_without_a_head_a_table_need_not_be_on_the_device() -> None:
    whole, space = llama(4, tied=True), Space(dict.fromkeys(TIERS, 2**30), own_memory=True)
    policy = dataclasses.replace(POLICY, weights=(0.0, 0.0, 1.0))
    tiers = [MemoryPlan.of(whole.of_layers(layers), policy, space).weights.tiers for layers in (range(2), range(2, 4))]
    assert [each[EMBEDDINGS] for each in tiers] == ["host", "device"]


@pytest.mark.parametrize("layers", [range(0), range(2, 9), range(0, 4, 2), range(-1, 2)])
def test_layers_that_are_not_there(layers: range) -> None:
    with pytest.raises(ValueError, match="a model that has 4"):
        shapes_with(4).of_layers(layers)
