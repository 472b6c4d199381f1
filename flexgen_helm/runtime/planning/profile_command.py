"""The command `flexgen-helm profile`: from its options to a table and a file."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from flexgen_helm.compression.config import resolve
from flexgen_helm.errors import FlexGenError
from flexgen_helm.machine.named_rates import named_rates
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.machine.profile_file import to_json, write_profile
from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.device import resolve_device
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.runtime.planning.machine_profile import Subject, machine_profile
from flexgen_helm.runtime.planning.sources import open_source
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
    if args.compile_layers and args.model is None:
        raise FlexGenError("--compile-layers measures layers of a model. Give --model M too, or leave it out.")
    subject = None
    if args.model is not None:
        source = open_source(resolve(args.model)[0], args.dtype, device)
        subject = Subject(source, resolved(None, device), args.compile_layers)
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
    rates = list(named_rates(profile))
    width = max(len(each.name) for each in rates)
    lines = [
        f"{each.name:{width}} {_value(each.rate.value, each.unit):>14} {each.rate.spread:6.0%}"
        f" {_value(each.rate.processor, each.unit) if each.rate.processor else '':>18}".rstrip()
        for each in rates
    ]
    return [
        f"{profile.name}, {profile.threads} threads: {profile.source}, {profile.date}",
        f"memory: {memory}",
        *([f"link, both directions at once: {profile.duplex:.2f} of their sum"] if profile.own_memory else []),
        f"{'':{width}} {'median':>14} spread  by processor time",
        *lines,
    ]


def _value(value: float, unit: str) -> str:
    if unit == "s":
        return _seconds(value)
    prefix, factor = ("T", 1e12) if value >= 1e12 else ("G", 1e9)
    return f"{value / factor:.2f} {prefix}{unit}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
