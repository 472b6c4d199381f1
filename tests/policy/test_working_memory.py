"""Working memory: the buffer in which a CPU widens weights of 16 bits, and activations that come one after the other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flexgen_helm.machine.slices import SCRATCH_BYTES
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.shapes_of_model import plain_formats, shapes_of
from flexgen_helm.policy.space import Space
from flexgen_helm.types import ON_DEVICE, TIERS, ResolvedPolicy, Tier

GIB = 2**30
POLICY = ResolvedPolicy(gpu_batch_size=64, gpu_batch_tokens=256)


def sizes(**fields: Any) -> ModelShapes:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, vocab_size=1000, **fields))
    return shapes_of(model, plain_formats(model), torch.float32)


@pytest.mark.parametrize("own_memory", [False, True])
def test_a_cpu_has_room_to_widen_a_slice_of_16_bits(own_memory: bool) -> None:
    in_fp32 = sizes()
    on_cpu = Space(dict.fromkeys(TIERS, 20 * GIB), own_memory)
    on_gpu = dataclasses.replace(on_cpu, is_gpu=True)
    for shapes, expected in ((in_fp32.at_16_bits(), 2 * SCRATCH_BYTES), (in_fp32, 0)):
        cpu, gpu = (MemoryPlan.of(shapes, POLICY, space) for space in (on_cpu, on_gpu))
        assert cpu.working_bytes - gpu.working_bytes == cpu.checking_bytes - gpu.checking_bytes == expected
        tier: Tier = "device" if own_memory else "host"
        assert cpu.running_with({})[tier] - gpu.running_with({})[tier] == expected


@pytest.mark.parametrize(
    ("tokens", "is_gpu", "inner", "less"),
    [
        (256, False, 11008, 20480),  # 42496 of all matrices, 36864 of attention with its own
        (256, False, 4096, 12288),  # 28672 and 36864
        (256, False, 16384, 18432),  # of 53248 the last 36864 count one and a half times
        (32, False, 11008, 0),  # 512 KiB of weighted sums lie in the heap
        (256, True, 11008, 0),
    ],
)
def test_attention_is_free_before_the_inner_layer_where_large_tensors_are_mapped(
    tokens: int, is_gpu: bool, inner: int, less: int
) -> None:
    """Elements of fp32 for each token: 4096 of queries, K, V, output and second matrix, 5 times 4096 of weighted sums."""
    space = Space(dict.fromkeys(TIERS, 20 * GIB), own_memory=is_gpu, is_gpu=is_gpu)
    rows = dataclasses.replace(POLICY, gpu_batch_tokens=tokens)
    resident, on_disk = (
        MemoryPlan.of(sizes(intermediate_size=inner), dataclasses.replace(rows, weights=weights), space)
        for weights in (ON_DEVICE, (0.0, 0.0, 1.0))
    )
    assert resident.working_bytes - on_disk.working_bytes == tokens * less * 4
