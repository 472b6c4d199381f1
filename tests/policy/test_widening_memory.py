"""The plan of memory has room for the buffer in which a CPU widens weights of 16 bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flexgen_helm.machine.slices import SCRATCH_BYTES
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.shapes_of_model import plain_formats, shapes_of
from flexgen_helm.policy.space import Space
from flexgen_helm.types import TIERS, ResolvedPolicy, Tier

GIB = 2**30
POLICY = ResolvedPolicy(gpu_batch_size=64, gpu_batch_tokens=256)


@pytest.mark.parametrize("own_memory", [False, True])
def test_a_cpu_has_room_to_widen_a_slice_of_16_bits(own_memory: bool) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, vocab_size=1000))
    in_fp32 = shapes_of(model, plain_formats(model), torch.float32)
    on_cpu = Space(dict.fromkeys(TIERS, 20 * GIB), own_memory)
    on_gpu = dataclasses.replace(on_cpu, is_gpu=True)
    for shapes, expected in ((in_fp32.at_16_bits(), 2 * SCRATCH_BYTES), (in_fp32, 0)):
        cpu, gpu = (MemoryPlan.of(shapes, POLICY, space) for space in (on_cpu, on_gpu))
        assert cpu.working_bytes - gpu.working_bytes == cpu.checking_bytes - gpu.checking_bytes == expected
        tier: Tier = "device" if own_memory else "host"
        assert cpu.running_with({})[tier] - gpu.running_with({})[tier] == expected
