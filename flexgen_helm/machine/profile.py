"""Machine profile: what one machine has and how fast it is, measured or written by hand. Plain data, no torch.

The planner predicts with it (`flexgen_helm.policy.planner`). Rates are those of one resource while the others are idle, unless
a field says otherwise. A field that is None was not measured, and whatever needs it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from flexgen_helm.types import Tier

RowKind = Literal["prefill", "decode"]
Place = Literal["device", "host"]
"""Where something is computed: on the device, which is the CPU where there is no other; or on the CPU beside a device with a
memory of its own."""


@dataclass(frozen=True)
class Rate:
    """A measured rate, per second.

    Attributes:
        value: The median of the rounds.
        spread: Difference between the largest and the smallest round, over the median.
        processor: The median by processor time, which is nearer to an idle machine where others work too; 0: not measured.
    """

    value: float
    spread: float = 0.0
    processor: float = 0.0


@dataclass(frozen=True)
class ProductRate:
    """Floating-point operations per second of a matrix product on the device.

    Attributes:
        dtype: Dtype of weights and inputs, such as "bfloat16".
        tokens: Tokens that meet the matrix at a time.
        rate: Operations per second, two for each token and weight. The weights are read from memory.
        packed: Whether weights are in the layout of the library that multiplies, as those that stay on a CPU may be.
    """

    dtype: str
    tokens: int
    rate: Rate
    packed: bool = False


@dataclass(frozen=True)
class AttentionRate:
    """Speed of attention.

    Attributes:
        place: Where it is computed.
        kind: Kind of row.
        format: Dtype or format of the pages that are read: "float32", "bfloat16", "kv4" and so on.
        rate: Prefill: floating-point operations per second, four for each query, head, element of a head, and key of the chunks
            of 128 that the query meets. Decode: bytes of K and V as they are stored per second, in whole chunks too.
        kernel: What computed it on a device, as `flexgen_helm.types.MachineNumerics` names it; empty: not said.
    """

    place: Place
    kind: RowKind
    format: str
    rate: Rate
    kernel: str = ""


@dataclass(frozen=True)
class UnpackRate:
    """Speed of bringing stored weights to the form in which they multiply.

    Attributes:
        place: Where. A format that only a CPU decodes has a rate at each place beside a device with a memory of its own.
        format: Scheme and bits, such as "w4" or "w4-entropy", or "lossless".
        rate: Bytes of the result per second: of the carried form for "host", of the bound form for "device".
        dtype: Dtype of the result; empty: any.
    """

    place: Place
    format: str
    rate: Rate
    dtype: str = ""


@dataclass(frozen=True)
class ProcessorSeconds:
    """Processor time of each of the threads for what a `LayerTime` says, which is nearer to an idle machine."""

    seconds: float
    next_seconds: float
    record_seconds: float


@dataclass(frozen=True)
class LayerTime:
    """Time of one layer of a real model for one whole row whose tokens attend to their own chunk only, weights in place.

    Where layers differ, it is their mean. The weights are read from memory, as for the first row of a layer.

    Attributes:
        model: Signature of the model's sizes, see `flexgen_helm.policy.planner.signature`.
        dtype: Dtype of weights.
        kind: Kind of row.
        tokens: Size of the row.
        seconds: Median of the rounds.
        spread: As in `Rate`.
        packed: As in `ProductRate`.
        next_seconds: The same right behind such a row, with what is left of the weights in caches; 0: not measured.
        record_seconds: Time of recording such a row and of planning its attention, once a sweep; 0: not measured.
        processor: The same by processor time; None: not measured.
        compiled: Whether layers were compiled (`flexgen_helm.model.compiled`).
        mapped: Whether large tensors got memory of their own, as where a CPU streams weights
            (`flexgen_helm.memory.allocator.LargeTensorMaps`): page faults take up to a sixth of a small layer's time.
    """

    model: str
    dtype: str
    kind: RowKind
    tokens: int
    seconds: float
    spread: float = 0.0
    packed: bool = False
    next_seconds: float = 0.0
    record_seconds: float = 0.0
    processor: ProcessorSeconds | None = None
    compiled: bool = False
    mapped: bool = False


@dataclass(frozen=True)
class MachineProfile:
    """What a machine has and how fast it is. Bytes are per second.

    Attributes:
        name: Name of the profile.
        date: Day of the measurement, as 2026-11-29; for a hand-written profile that of its sources.
        source: How it was made: "measured", or where its figures come from.
        device: Name of the device.
        own_memory: Whether the device has a memory of its own; else device and host are one RAM.
        is_gpu: Whether the device is a GPU.
        threads: Threads that compute on the CPU.
        memory: Bytes of each tier.
        device_read: Memory of the device, read.
        host_read: Memory of the host, read by all threads.
        host_to_device: Link to the device from pinned memory; None where device and host are one.
        device_to_host: Link back.
        duplex: Bytes per second over both directions at once, over the sum of both rates: 1 if neither slows the other.
        disk_read: Direct reads of large pieces.
        disk_write: Direct writes of large pieces.
        products: Matrix products on the device.
        attention: Attention.
        unpack: Unpacking.
        call_seconds: Fixed time of a layer call on the device, by kind of row: dispatch, launches, waits.
        operation_seconds: Fixed time of any other operation of a sweep in the executor.
        processor_call_seconds: `call_seconds` by processor time; empty: not measured.
        processor_operation_seconds: `operation_seconds` by processor time; 0: not measured.
        layers: Times of layers of real models; where one fits, it replaces what the rates say.
    """

    name: str
    date: str
    source: str
    device: str
    own_memory: bool
    is_gpu: bool
    threads: int
    memory: Mapping[Tier, int]
    device_read: Rate
    host_read: Rate
    host_to_device: Rate | None = None
    device_to_host: Rate | None = None
    duplex: float = 1.0
    disk_read: Rate | None = None
    disk_write: Rate | None = None
    products: tuple[ProductRate, ...] = ()
    attention: tuple[AttentionRate, ...] = ()
    unpack: tuple[UnpackRate, ...] = ()
    call_seconds: Mapping[RowKind, float] = field(default_factory=dict)
    operation_seconds: float = 0.0
    processor_call_seconds: Mapping[RowKind, float] = field(default_factory=dict)
    processor_operation_seconds: float = 0.0
    layers: tuple[LayerTime, ...] = ()

    def with_layers(self, *, compiled: bool) -> MachineProfile:
        """Return the profile with the times of layers of one kind only: those that were compiled, or those that were not."""
        return replace(self, layers=tuple(layer for layer in self.layers if layer.compiled == compiled))

    def by_processor_time(self) -> MachineProfile:
        """Return the profile with what was measured by processor time in place of the clock on the wall; else it stays.

        It predicts the processor time of a run, and the time of a run on a machine where nothing else works.
        """
        return replace(
            self,
            device_read=_by_processor(self.device_read),
            host_read=_by_processor(self.host_read),
            products=tuple(replace(each, rate=_by_processor(each.rate)) for each in self.products),
            attention=tuple(replace(each, rate=_by_processor(each.rate)) for each in self.attention),
            unpack=tuple(replace(each, rate=_by_processor(each.rate)) for each in self.unpack),
            call_seconds=self.processor_call_seconds or self.call_seconds,
            operation_seconds=self.processor_operation_seconds or self.operation_seconds,
            layers=tuple(replace(each, **vars(each.processor)) if each.processor else each for each in self.layers),
        )


def _by_processor(rate: Rate) -> Rate:
    return replace(rate, value=rate.processor or rate.value)
