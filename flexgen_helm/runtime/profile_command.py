"""The command `flexgen-helm profile`: from its options to a table and a file."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from flexgen_helm.compression.config import resolve
from flexgen_helm.loading.named_configs import named_config
from flexgen_helm.loading.source import ModelSource, open_dummy, open_without_weights
from flexgen_helm.machine.profile import MachineProfile, Rate
from flexgen_helm.machine.profile_file import to_json, write_profile
from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.device import Device, resolve_device
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.runtime.machine_profile import Subject, machine_profile
from flexgen_helm.types import TIERS


def run_profile(args: Namespace, say: Callable[[str], None]) -> int:
    """Measure this machine anew, print what was found, and write the file that was asked for.

    Args:
        args: Options of the command.
        say: Told what is measured, a line at a time.

    Raises:
        FlexGenError: If the model or the disk cannot be used, or the file cannot be written.
    """
    device = resolve_device(args.device)
    subject = None if args.model is None else Subject(_open(args.model, args.dtype, device), resolved(None, device))
    profile = machine_profile(
        device,
        subject=subject,
        folder=args.offload_folder,
        say=say,
        say_part=lambda part: say(f"  {part}"),
        again=True,
    )
    if args.out is not None:
        write_profile(profile, args.out)
    print(to_json(profile) if args.json else "\n".join(table(profile)))
    return 0


def table(profile: MachineProfile) -> list[str]:
    """Return a profile as lines for a reader."""
    memory = ", ".join(f"{tier} {gib(profile.memory[tier])}" for tier in TIERS)
    head = [
        f"{profile.name}, {profile.threads} threads: {profile.source}, {profile.date}",
        f"memory: {memory}",
        f"{'rate':46} {'median':>12}  spread",
    ]
    return [*head, *(f"{name:46} {value:>12}  {spread}" for name, value, spread in _rows(profile))]


def _rows(profile: MachineProfile) -> Iterator[tuple[str, str, str]]:
    """Return names, medians and spreads."""
    raw = {
        "device memory, read": profile.device_read,
        "host memory, read": profile.host_read,
        "link to the device": profile.host_to_device,
        "link to the host": profile.device_to_host,
        "disk, direct read": profile.disk_read,
        "disk, direct write": profile.disk_write,
    }
    yield from (_row(name, rate, "B/s") for name, rate in raw.items() if rate is not None)
    if profile.host_to_device is not None:
        yield "both directions of the link, share of their sum", f"{profile.duplex:.2f}", ""
    for product in profile.products:
        packed = ", packed" if product.packed else ""
        yield _row(f"products, {product.dtype}, {product.tokens} tokens{packed}", product.rate, "FLOP/s")
    for attention in profile.attention:
        unit = "FLOP/s" if attention.kind == "prefill" else "B/s"
        yield _row(f"{attention.kind} attention, {attention.format}, {attention.place}", attention.rate, unit)
    for unpack in profile.unpack:
        yield _row(f"unpacking {unpack.format} to {unpack.dtype}, {unpack.place}", unpack.rate, "B/s")
    for kind, seconds in profile.call_seconds.items():
        yield f"fixed time of a layer call, {kind} row", _seconds(seconds), ""
    yield "fixed time of another operation", _seconds(profile.operation_seconds), ""
    for layer in profile.layers:
        packed = ", packed" if layer.packed else ""
        name = f"layer, {layer.kind} row of {layer.tokens}, {layer.dtype}{packed}"
        yield name, _seconds(layer.seconds), f"{layer.spread:.0%}"


def _row(name: str, rate: Rate, unit: str) -> tuple[str, str, str]:
    prefix, factor = ("T", 1e12) if rate.value >= 1e12 else ("G", 1e9)
    return name, f"{rate.value / factor:.2f} {prefix}{unit}", f"{rate.spread:.0%}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _open(name: str, dtype: str, device: Device) -> ModelSource:
    """Open a model of which only the config is needed."""
    model, _ = resolve(name)
    where = device.torch_device
    if named_config(model) is not None or (Path(model) / "config.json").is_file():
        return open_dummy(model, dtype=dtype, device=where)
    return open_without_weights(model, dtype=dtype, device=where)
