"""The rows that are counted: models at their real sizes, of which three layers are enough."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, PreTrainedConfig

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.loading.named_configs import CONFIGS
from flexgen_helm.model import experts
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.rows import packed
from flexgen_helm.rows.choice import CHECKS
from flexgen_helm.rows.self_check import FirstLayers, LayerCache, Verdict
from flexgen_helm.runtime import verdicts
from flexgen_helm.types import ResolvedPolicy
from tests.jobs import random_tokens
from tests.simulated_gpu.allocator import GIB
from tests.simulated_gpu.layer_costs.counting import Counts, Ledger, as_one_kernel, counted
from tests.simulated_gpu.patches import simulated_gpu
from tests.simulated_gpu.tensors import GpuTensor

NUM_LAYERS = 3
FIRST, STEADY = 0, 1
"""The first layer plans, the last one picks what the output head needs; the one of three between them does neither."""
DECODE_TOKENS, PROMPT_TOKENS, SHARED_TOKENS, SCORED_TOKENS = 544, 512, 600, 100
MOST_TOKENS = 49_152
"""Prompt tokens of a sweep: all prompts enter in the first one, so that all sequences decode together."""
MEMORY = {"device": "16GiB", "host": "400GiB", "disk": "1GiB"}
"""Room for three layers and for K and V of the rows; a larger cache would take real memory while it is made."""
ON_HOST, ON_DEVICE = (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Case:
    """Some rows of a model under a policy.

    Attributes:
        model: Key of `MODELS`.
        rows: What the rows hold.
        jobs: Jobs that make the rows.
        is_row: Whether row k of a sweep, of this kind, is one that is meant.
        policy: Where things are.
        kernel: Whether the Triton kernel attends on the device.
    """

    model: str
    rows: str
    jobs: Callable[[], list[Job]]
    is_row: Callable[[int, str], bool]
    policy: Policy
    kernel: bool

    @property
    def attention(self) -> str:
        """What attends for the row."""
        if "CPU" in self.rows:
            return "CPU"
        return "kernel" if self.kernel else "by hand"


class Cost(NamedTuple):
    """A row in a layer, and what this layer's weights take."""

    row: Counts
    weights: Counts


def opt_30b() -> PreTrainedConfig:
    config = CONFIGS["facebook/opt-30b"]()
    config.dtype = torch.bfloat16
    return config


MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "OPT-30B": opt_30b,
    "Llama-3-8B": CONFIGS["meta-llama/Llama-3.1-8B"],
    "Mixtral-8x7B": lambda: MixtralConfig(dtype="bfloat16"),  # the defaults of transformers are its sizes
}


def cases() -> Iterator[Case]:
    """Yield every case, each by hand and with the kernel where the device attends."""
    streamed = Policy(48, 1, 4096, block_tokens=MOST_TOKENS, weights=ON_HOST, cache=ON_HOST, overlap=False)
    resident = Policy(64, 1, 2048, block_tokens=MOST_TOKENS, weights=ON_DEVICE, cache=ON_DEVICE, overlap=False)
    moved = replace(streamed, cache=ON_DEVICE, gpu_batch_tokens=2048, cpu_attention=0)
    on_cpu, brought = replace(streamed, cpu_attention=1), replace(streamed, cpu_attention=0)
    yield _decode("OPT-30B", 40, on_cpu, "the CPU attends", kernel=False)
    for kernel in (False, True):
        yield _decode("OPT-30B", 40, brought, "K/V brought", kernel=kernel)
        yield _prompt("OPT-30B", 4096, on_cpu, kernel=kernel)
        yield _scoring("OPT-30B", on_cpu, kernel=kernel)
        yield _decode("Llama-3-8B", 64, resident, "resident", kernel=kernel)
        yield _prompt("Llama-3-8B", 2048, resident, kernel=kernel)
        yield _decode("Mixtral-8x7B", 40, moved, "K/V on the device", kernel=kernel)
        yield _prompt("Mixtral-8x7B", 2048, moved, kernel=kernel)


def _decode(model: str, count: int, policy: Policy, how: str, *, kernel: bool) -> Case:
    """Sequences that decode in one row, twice: the first of the two makes room that is kept."""

    def jobs() -> list[Job]:
        prompts = (random_tokens(seed, DECODE_TOKENS - 2) for seed in range(count))
        return [Job(token_ids=prompt, max_new_tokens=3, ignore_eos=True) for prompt in prompts]

    return Case(model, f"decode, {count} x {DECODE_TOKENS}, {how}", jobs, lambda k, kind: kind == "decode", policy, kernel)


def _prompt(model: str, size: int, policy: Policy, *, kernel: bool) -> Case:
    """Two rows of prompts: the first of them makes room that is kept."""

    def jobs() -> list[Job]:
        prompts = (random_tokens(seed, PROMPT_TOKENS) for seed in range(2 * size // PROMPT_TOKENS))
        return [Job(token_ids=prompt, max_new_tokens=2, ignore_eos=True) for prompt in prompts]

    return Case(
        model, f"prompt, {size:,} of {PROMPT_TOKENS}", jobs, lambda k, kind: kind == "prefill" and k == 1, policy, kernel
    )


def _scoring(model: str, policy: Policy, *, kernel: bool) -> Case:
    """The first row holds the shared tokens; the second one attends to them where they are."""

    def jobs() -> list[Job]:
        shared, count = random_tokens(0, SHARED_TOKENS), 2 * (4096 // SCORED_TOKENS)
        return [
            Job(token_ids=[*shared, *random_tokens(1 + seed, SCORED_TOKENS)], max_new_tokens=0, score_prompt=True)
            for seed in range(count)
        ]

    rows = f"scoring, {SCORED_TOKENS} each behind {SHARED_TOKENS}"
    return Case(model, rows, jobs, lambda k, kind: k == 1, policy, kernel)


def counts_of(case: Case, folder: Path) -> dict[int, Cost]:
    """Return what the case's row costs in the first and in the steady layer; the last one where there are several.

    Args:
        case: The case.
        folder: Of the model's config; made if it is not there.
    """
    config = MODELS[case.model]()
    config.num_hidden_layers = NUM_LAYERS
    config.save_pretrained(folder)
    with ExitStack() as stack:
        gpu = stack.enter_context(simulated_gpu(80 * GIB, shapes_only=True))
        stack.enter_context(patch.dict(CHECKS, packed=_unchecked))
        stack.enter_context(patch.object(verdicts, "cache_folder", lambda: folder))  # no other engine may read what is untrue
        stack.enter_context(patch.object(experts, "sliced_experts", evenly(experts.sliced_experts)))
        if case.kernel:
            stack.enter_context(patch.object(packed, "_kernel_for", lambda *_: as_one_kernel))
        ledger = stack.enter_context(counted(gpu))
        options: dict[str, Any] = {"dummy_weights": True, "offload_folder": folder / "o", "max_memory": MEMORY}
        with Engine.from_pretrained(str(folder), device="cuda", policy=case.policy, **options) as engine:
            engine.run(case.jobs(), progress=False)
        del engine
        gc.collect()  # tensors of the device live in circles too
    return {j: _cost(case, ledger, j) for j in (FIRST, STEADY)}


def _cost(case: Case, ledger: Ledger, j: int) -> Cost:
    rows = [
        ledger.cells[sweep, k, j]
        for sweep, found in ledger.rows.items()
        for k, row in enumerate(found)
        if case.is_row(k, row.kind) and (sweep, k, j) in ledger.cells
    ]
    return Cost(rows[-1], ledger.weights.get(j, Counts()))


def _unchecked(model: RecordedModel, policy: ResolvedPolicy, *, max_length: int, first: FirstLayers | None = None) -> Verdict:
    """The self-check's verdict; numbers without content cannot be checked."""
    config = model.model.config
    num_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = LayerCache((2 * num_heads * head_dim * model.model.dtype.itemsize,))
    return Verdict(0.0, True, (layer,) * len(model.layers))


def evenly(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Experts of which each gets as many tokens as the others; a router without numbers would choose the first one."""

    def computed(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        assert isinstance(index, GpuTensor)
        chosen = torch.arange(index.numel()).view(index.shape) % int(module.num_experts)  # type: ignore[arg-type]
        return compute(module, hidden, GpuTensor(chosen, index.memory), weights)

    return computed
