"""Layers of large models at their real size, without content: torch reserves no more of a device than may be used."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Gemma2Config, MixtralConfig, PreTrainedConfig

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.loading.named_configs import CONFIGS
from flexgen_helm.model import experts
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.policy.cache_plan import CACHE_SHARE
from flexgen_helm.rows.choice import CHECKS
from flexgen_helm.rows.packed_check import check_packed
from flexgen_helm.rows.self_check import FirstLayers, LayerCache, Verdict
from flexgen_helm.runtime.free_space import GPU_PROCESS_BYTES
from flexgen_helm.types import ResolvedPolicy
from tests.jobs import random_tokens
from tests.simulated_gpu.allocator import GIB, LARGE_SEGMENT
from tests.simulated_gpu.layer_costs.rows import evenly
from tests.simulated_gpu.patches import simulated_gpu

NUM_LAYERS = 2
"""Layers are alike, and slots, pages of a layer and working memory have their real size with any number of them."""
JOBS = [Job(token_ids=random_tokens(seed, 300 + seed), max_new_tokens=3, ignore_eos=True) for seed in range(56)]
ROW_JOBS = 16
"""Jobs that fill a prefill row and more; more of them take no more memory than the cache has."""
POLICY = Policy(
    gpu_batch_size=32,
    num_gpu_batches=5,
    gpu_batch_tokens=2048,
    block_tokens=4096,
    weights=(0, 1, 0),
    cache=(1, 0, 0),
    cpu_attention=0,
)
"""More sequences than fit: the cache takes what there is. Prompts enter in several sweeps, so that pages that grew would leave
their former sizes behind."""


def gemma2_27b() -> PreTrainedConfig:
    """Gemma 2 (Gemma Team 2024, table 1); the kinds of its layers follow from their number."""
    return Gemma2Config(
        hidden_size=4608,
        intermediate_size=36864,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
        num_hidden_layers=NUM_LAYERS,
        dtype="bfloat16",
    )


MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "OPT-30B": CONFIGS["facebook/opt-30b"],
    "Llama-2-13B": CONFIGS["meta-llama/Llama-2-13b-hf"],
    "Llama-3.1-8B": CONFIGS["meta-llama/Llama-3.1-8B"],
    "Mixtral-8x7B": lambda: MixtralConfig(dtype="bfloat16"),  # the defaults of transformers are its sizes
    "Gemma-2-27B": gemma2_27b,
}
TIGHT = ("OPT-30B", 5.5, True)
"""Where the jobs fill the cache."""


def check_on_the_device(
    model: RecordedModel, policy: ResolvedPolicy, *, max_length: int, first: FirstLayers | None = None
) -> Verdict:
    """The self-check; where the device has no room for it, the host's large tensors have no content to be checked."""
    if model.device.type == "cuda":
        return check_packed(model, policy, max_length=max_length, first=first)
    config = model.model.config
    num_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = config.hidden_size // config.num_attention_heads
    return Verdict(0.0, True, (LayerCache((2 * num_heads * head_dim * model.model.dtype.itemsize,)),))


def cases() -> list[object]:
    """Models on devices of 15 and 24 GiB, which are the whole device or what the user allows of a larger one."""
    every = [TIGHT, *itertools.product(MODELS, (15, 24), (False, True))]
    return [pytest.param(*case, marks=[] if case == TIGHT else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("model", "size", "limited"), cases())
def test_reserved_memory(
    model: str,
    size: float,
    limited: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CHECKS, "packed", check_on_the_device)
    monkeypatch.setattr(experts, "sliced_experts", evenly(experts.sliced_experts))
    config = MODELS[model]()
    config.num_hidden_layers = NUM_LAYERS
    config.save_pretrained(tmp_path)
    max_memory = {"device": f"{size}GiB"} if limited else None
    with simulated_gpu(int((80 if limited else size) * GIB), shapes_only=True) as gpu:
        with Engine.from_pretrained(
            str(tmp_path),
            device="cuda",
            policy=POLICY,
            dummy_weights=True,
            max_memory=max_memory,
            offload_folder=tmp_path / "o",
        ) as engine:
            plan, cache = engine._parts.plan, engine.describe().cache_bytes["device"]
            gpu.allocator.reset_peaks()  # the self-check had all of the device to itself
            with caplog.at_level(logging.WARNING):
                engine.run(JOBS if (model, size, limited) == TIGHT else JOBS[:ROW_JOBS], progress=False)
        del engine
        gc.collect()
    usable = size * GIB - (0 if limited else GPU_PROCESS_BYTES)
    around = plan.weights.needed_bytes["device"] + plan.working_bytes
    memory = gpu.allocator
    assert not caplog.records, "memory did not suffice"
    assert memory.most_allocated <= around + cache
    assert memory.most_reserved <= around + cache / CACHE_SHARE <= usable  # the plan's margin is for fragments too
    # Nothing of what the self-check used counts as taken.
    assert cache == pytest.approx(CACHE_SHARE * (usable - around) / plan.cache.taken["device"], abs=LARGE_SEGMENT)
