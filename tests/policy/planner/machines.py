"""Machines and models for tests of the planner, written by hand."""

from __future__ import annotations

from dataclasses import replace

from flexgen_helm.machine.profile import AttentionRate, MachineProfile, ProductRate, Rate, UnpackRate
from flexgen_helm.policy.model_shapes import EMBEDDINGS, ModelShapes
from flexgen_helm.policy.space import Space
from flexgen_helm.types import Tier

GIB = 2**30
FORMATS = ("float16", "bfloat16", "float32")


def t4(device: float = 15, host: float = 200, disk: float = 1500) -> MachineProfile:
    """The paper's machine (facts of FlexGen section 6): 12 GB/s to the GPU, 2 and 1 GB/s from and to the disk."""
    memory: dict[Tier, int] = {"device": int(device * GIB), "host": int(host * GIB), "disk": int(disk * GIB)}
    return MachineProfile(
        name="t4",
        date="2026-11-29",
        source="tests",
        device="NVIDIA T4",
        own_memory=True,
        is_gpu=True,
        threads=16,
        memory=memory,
        device_read=Rate(250e9),
        host_read=Rate(60e9),
        host_to_device=Rate(12e9),
        device_to_host=Rate(12e9),
        duplex=0.8,
        disk_read=Rate(2e9),
        disk_write=Rate(1e9),
        products=tuple(
            ProductRate(dtype, n, Rate(r)) for dtype in FORMATS for n, r in ((1, 0.25e12), (64, 12e12), (512, 25e12))
        ),
        attention=(
            *(AttentionRate("device", "prefill", form, Rate(5e12)) for form in FORMATS),
            *(AttentionRate("device", "decode", form, Rate(150e9)) for form in FORMATS),
            *(AttentionRate("host", "decode", form, Rate(20e9)) for form in FORMATS),
        ),
        unpack=(
            UnpackRate("device", "w4", Rate(60e9)),
            UnpackRate("host", "w4", Rate(5e9)),
            UnpackRate("host", "lossless", Rate(5e9)),
        ),
        call_seconds={"prefill": 5e-4, "decode": 3e-4},
        operation_seconds=2e-5,
    )


def cpu(ram: float = 16, disk: float = 200) -> MachineProfile:
    """A small CPU: device and host are one memory."""
    gpu = t4(ram, ram, disk)
    products = tuple(ProductRate(dtype, n, Rate(r)) for dtype in FORMATS for n, r in ((1, 10e9), (64, 80e9), (512, 120e9)))
    attention = (
        *(AttentionRate("device", "prefill", form, Rate(40e9)) for form in FORMATS),
        *(AttentionRate("device", "decode", form, Rate(5e9)) for form in FORMATS),
    )
    return replace(
        gpu,
        name="cpu",
        device="CPU",
        own_memory=False,
        is_gpu=False,
        threads=2,
        device_read=Rate(12e9),
        host_read=Rate(12e9),
        host_to_device=None,
        device_to_host=None,
        duplex=1.0,
        products=products,
        attention=attention,
        unpack=(UnpackRate("device", "w4", Rate(2e9)), UnpackRate("device", "lossless", Rate(2e9))),
    )


def space_of(profile: MachineProfile) -> Space:
    """All the memory of a machine."""
    return Space(profile.memory, profile.own_memory, is_gpu=profile.is_gpu)


def model(
    layers: int, hidden: int, heads: int, *, kv_heads: int | None = None, vocab: int = 50272, itemsize: int = 2
) -> ModelShapes:
    """A decoder with an inner size of four times the hidden size, and tied embeddings, as OPT has."""
    kv = kv_heads or heads
    head_dim = hidden // heads
    elements = hidden * (2 * hidden + 2 * kv * head_dim) + 8 * hidden * hidden
    units = dict.fromkeys(range(layers), elements * itemsize)
    return ModelShapes(
        num_layers=layers,
        stored_bytes={**units, EMBEDDINGS: vocab * hidden * itemsize},
        carried_bytes=units,
        bound_bytes=units,
        disk_bytes=units,
        is_coded=False,
        is_packed=False,
        vocab_size=vocab,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        outputs_per_token=7 * hidden + 2 * kv * head_dim,
        itemsize=itemsize,
        kv_itemsize=itemsize,
        first_layers_bytes=elements * itemsize + 2 * 512 * hidden * itemsize,
        dtype="float16" if itemsize == 2 else "float32",
        kv_format="float16" if itemsize == 2 else "float32",
    )
