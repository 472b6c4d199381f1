"""Measure how fast the stored forms of weights are brought to the form in which they multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from flexgen_helm.compression.config import parse
from flexgen_helm.compression.lossless import CODED_BITS
from flexgen_helm.compression.lossless_slab import encode_slab
from flexgen_helm.compression.scheme import CodedScheme, Parts, Scheme
from flexgen_helm.compression.schemes import EntropyCoded, scheme_of
from flexgen_helm.compression.sensitivity import Sensitivity
from flexgen_helm.machine.profile import Place, Rate, UnpackRate
from flexgen_helm.machine.rates import random_numbers
from flexgen_helm.machine.rounds import rate_of, seconds_of
from flexgen_helm.machine.threads import in_threads
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.slab import SlabLayout, SlabTensor

FORMATS = ("w8", "w4", "w3", "w2", "w4-minmax", "w4-entropy")
"""Formats of quantised weights that are measured; others have the rate of the nearest one."""
LOSSLESS = "lossless"
SHAPE = (1024, 1536)
"""Of a matrix that is packed once, and unpacked into many targets."""
NUM_TARGETS = {"cpu": 16, "cuda": 256}
"""By type of device. Together they are larger than caches."""
LOSSLESS_NUMBERS = 2**23
"""Numbers that are coded without loss."""


def unpack_rates(device: Device, dtype: torch.dtype, formats: Sequence[str] | None = None) -> Iterator[UnpackRate]:
    """Measure formats, on the device and, beside one with a memory of its own, on the CPU too.

    Args:
        device: The device.
        dtype: Of the weights that multiply.
        formats: Which; None: all. Other dtypes than those of 16 bits have no `LOSSLESS`.
    """
    formats = (*FORMATS, LOSSLESS) if formats is None else formats
    for name in formats:
        if name == LOSSLESS:
            continue
        scheme = _scheme(name)
        yield from _quantized(name, scheme, _stored(scheme), device, dtype)
    if dtype in CODED_BITS and LOSSLESS in formats:
        yield _lossless("host" if device.own_memory else "device", dtype)


def _scheme(name: str) -> Scheme:
    config = parse(name)
    assert config.bits is not None
    return scheme_of(config.scheme, config.bits)


def _stored(scheme: Scheme) -> Parts:
    """Return a stored matrix of random weights, of which columns and rows do not all matter alike."""
    weight = random_numbers(SHAPE, CPU.torch_device, torch.float32) / 30
    chance = torch.Generator().manual_seed(1)
    known = Sensitivity(*(torch.rand(n, generator=chance) ** 4 for n in (SHAPE[1], SHAPE[0])))
    with torch.inference_mode():
        decided = scheme.solve({"0": scheme.observe(weight, known)}, {"0": weight}) if scheme.needs_statistics else {}
        return scheme.pack(weight, decided.get("0", {}))


def _quantized(name: str, scheme: Scheme, stored: Parts, device: Device, dtype: torch.dtype) -> Iterator[UnpackRate]:
    """Measure a scheme. Where only a CPU decodes, a device with a memory of its own unpacks what that decoded."""
    where, named = device.torch_device, str(dtype).removeprefix("torch.")
    carried = stored
    unpack: Callable[[Parts, Tensor], None] = partial(scheme.unpack)
    if isinstance(scheme, EntropyCoded):
        if device.own_memory:
            carried = _carried(scheme, stored)
            rate = _rate(partial(scheme.decode, stored), _copies(carried, CPU.torch_device), CPU.torch_device)
            yield UnpackRate("host", name, rate, named)
        else:
            unpack = partial(scheme.load)
    on_device = {part: x.to(where) for part, x in carried.items()}
    targets = _copies({"weight": torch.empty(SHAPE, dtype=dtype, device=where)}, where)
    yield UnpackRate("device", name, _rate(lambda target: unpack(on_device, target["weight"]), targets, where), named)


def _carried(scheme: CodedScheme, stored: Parts) -> Parts:
    on_meta = {name: torch.empty_like(x, device="meta") for name, x in stored.items()}
    carried = {name: torch.empty_like(x, device="cpu") for name, x in scheme.carried(on_meta, SHAPE).items()}
    scheme.decode(stored, carried)
    return carried


def _copies(parts: Parts, where: torch.device) -> list[Parts]:
    """Return targets like some tensors."""
    return [{name: torch.empty_like(x) for name, x in parts.items()} for _ in range(NUM_TARGETS[where.type])]


def _rate(work: Callable[[Parts], None], targets: list[Parts], where: torch.device) -> Rate:
    """Return the bytes per second at which targets are filled, on a CPU by all threads."""
    most = 1 if where.type == "cuda" else None
    num_bytes = sum(x.nbytes for target in targets for x in target.values())
    return rate_of(num_bytes, seconds_of(lambda: in_threads(work, targets, most=most), where))


def _lossless(place: Place, dtype: torch.dtype) -> UnpackRate:
    layout = SlabLayout((SlabTensor(("weight",), dtype, (LOSSLESS_NUMBERS,), 0),), LOSSLESS_NUMBERS * dtype.itemsize)
    bound = allocate(layout.num_bytes)
    layout.tensors[0].view(bound).copy_(random_numbers((LOSSLESS_NUMBERS,), CPU.torch_device, dtype))
    stored, form = encode_slab(bound, layout, dtype)
    seconds = seconds_of(lambda: form.decode(stored, bound), CPU.torch_device)
    return UnpackRate(place, LOSSLESS, rate_of(layout.num_bytes, seconds), str(dtype).removeprefix("torch."))
