"""The stage of a pipeline: which layers of a model a process computes, and what all stages must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from flexgen_helm.distributed.group import StageGroup
from flexgen_helm.distributed.messages import Message, SweepOrder
from flexgen_helm.distributed.neighbours import RowForm, StageNeighbours
from flexgen_helm.distributed.row_links import CpuRows, GpuRows, RowLink
from flexgen_helm.errors import FlexGenError, PolicyError, UnsupportedModel
from flexgen_helm.kv_cache.pages import Form, PageCounts, PagePool
from flexgen_helm.memory.amounts import MaxMemory
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.usage import free_bytes
from flexgen_helm.model.layers import READS_OTHERS_KV, layers_of
from flexgen_helm.model.recorder import RecordedModel, Recording
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.shapes_of_model import setting
from flexgen_helm.policy.stages.row_travel import row_frames
from flexgen_helm.processes import local_rank, num_local
from flexgen_helm.types import Numerics, Policy, ResolvedPolicy, StageInfo, Tier

ALONE = "Run it in one process, without torchrun."


@dataclass(frozen=True)
class Stage:
    """A stage while its engine is made."""

    group: StageGroup

    def num_lanes(self, policy: Policy) -> int:
        """Return the sweeps in flight: what the policy says, or one for each stage."""
        return policy.num_lanes or self.group.count

    def agreed_pools(self, pools: Mapping[Form, PagePool], block_tokens: int) -> tuple[dict[Form, PagePool], int]:
        """Return pages and prompt tokens for which every stage has room, as all stages number them alike.

        Args:
            pools: Pages by form for which this stage has room.
            block_tokens: Prompt tokens of a sweep for which it has room.
        """
        counts = {form: tuple(pool.capacities) for form, pool in pools.items()}
        found = self.group.exchange("pages", (counts, block_tokens))
        least = {form: PageCounts(*map(min, zip(*(each[form] for each, _ in found), strict=True))) for form in pools}
        return {form: pool.resized(least[form]) for form, pool in pools.items()}, min(tokens for _, tokens in found)

    def require_equal(self, numerics: Numerics) -> None:
        """Refuse stages that would compute other bits than one process.

        Raises:
            PolicyError: If the numerics of two stages differ; it names what does.
        """
        found = [asdict(each) for each in self.group.exchange("numerics", numerics)]
        for stage, other in enumerate(found):
            for part, value in other.items():
                if value != found[0][part]:
                    raise PolicyError(
                        f"The stages of the pipeline would compute different bits: {part} is {found[0][part]} on "
                        f"{self.group.name(0)} and {value} on {self.group.name(stage)}. Use equal machines and versions, or "
                        "name what differs in the policy."
                    )

    def all_infos(self, plan: MemoryPlan, layers: range, cache_bytes: Mapping[Tier, int]) -> tuple[StageInfo, ...]:
        """Describe all stages.

        Args:
            plan: Memory plan of this stage.
            layers: Its layers.
            cache_bytes: Its bytes of K and V on each tier.
        """
        own = StageInfo(
            name=self.group.name(self.group.index),
            first_layer=layers.start,
            last_layer=layers.stop - 1,
            weight_bytes=_plain(plan.weights.weight_bytes),
            planned_bytes=_plain(plan.weights.needed_bytes),
            cache_bytes=_plain(cache_bytes),
            travel_bytes=plan.travel_bytes,
        )
        return tuple(self.group.exchange("info", own))

    def neighbours(self, model: PreTrainedModel, layers: range, policy: ResolvedPolicy, device: Device) -> StageNeighbours:
        """Connect this stage with those before and behind it."""
        gpus = self.group.exchange("gpus", device.is_gpu)
        form = RowForm(setting(model, "hidden_size") or 0, model.dtype)
        link: RowLink
        if all(gpus) and torch.distributed.is_nccl_available():
            link = GpuRows(self.group, device.torch_device)
        else:
            link = CpuRows(self.group, row_frames(form.token_bytes, policy))
        neighbours = StageNeighbours(layers, form, link, stages=self.group, device=device.torch_device)
        self.group.on_message = partial(_expect_rows, neighbours)
        self.group.before_end = neighbours.close
        return neighbours

    def memory_limit(self, device: Device, asked: MaxMemory | None) -> MaxMemory | None:
        """Return the memory that a stage may use: what the user allows, or its part of what is free on its host."""
        free = self.group.exchange("free", free_bytes(CPU.torch_device))[self.group.index]
        count = num_local(self.group.count)
        if asked or device.own_memory or count == 1:
            return asked
        return {"host": free // count}


def _expect_rows(neighbours: StageNeighbours, message: Message) -> None:
    """Begin to receive the rows of a sweep as soon as it is ordered: they arrive while an earlier sweep is computed."""
    if isinstance(message, SweepOrder):
        neighbours.expect(message.rows)


def _plain(by_tier: Mapping[Tier, int]) -> dict[str, int]:
    return {str(tier): count for tier, count in by_tier.items()}


def stage_device(given: str | Device) -> str | Device:
    """Return the device of this process: the GPU with its number on its host, where a GPU is asked for without one."""
    if given == "auto":
        given = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{local_rank() % torch.cuda.device_count()}" if given == "cuda" else given


def refuse_shared_kv(model: PreTrainedModel) -> None:
    """Refuse a model whose layers read K and V of earlier layers, which another stage may have.

    Raises:
        UnsupportedModel: If there are such layers.
    """
    for j, layer in enumerate(layers_of(model)):
        if any(getattr(module, READS_OTHERS_KV, False) for module in layer.modules()):
            raise UnsupportedModel(f"{model.name_or_path}: layer {j} reads K and V of an earlier layer. {ALONE}")


def refuse_extra_outputs(model: RecordedModel, layers: range) -> None:
    """Refuse a model whose layers hand more to the next layer than the hidden state.

    Raises:
        UnsupportedModel: If the first layer of the stage takes more from the layer before.
    """
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    places = torch.arange(2, device=model.device)[None]
    with torch.inference_mode():
        recording = model.record(
            Recording(), input_ids=ids, position_ids=places, attention_mask=torch.ones_like(ids), use_cache=False
        )
    if recording.calls[layers.start].takes_outputs:
        raise UnsupportedModel(
            f"{model.model.name_or_path}: layer {layers.start} takes more from the layer before than the hidden state. {ALONE}"
        )


def require_divisible(*, order: str, free_shapes: bool, slab_coding: str) -> None:
    """Refuse options that a pipeline does not have.

    Raises:
        FlexGenError: If there is one; the message names it.
    """
    asked = {"order": order != "zigzag", "free_shapes": free_shapes, "slab_coding": slab_coding == "lossless"}
    for name, is_asked in asked.items():
        if is_asked:
            raise FlexGenError(f"{name} cannot be set where layers are divided into stages. Leave it out, or use one process.")
