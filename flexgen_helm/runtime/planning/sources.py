"""Models and devices for plans: of a model only the config is needed, and the device need not exist here."""

from __future__ import annotations

from pathlib import Path

import torch

from flexgen_helm.errors import FlexGenError
from flexgen_helm.loading.named_configs import named_config
from flexgen_helm.loading.source import ModelSource, open_dummy, open_without_weights
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.memory.device import Device


def open_source(model: str | Path, dtype: str, device: Device) -> ModelSource:
    """Open a model of which only the config is needed: a name, a folder, or a config file."""
    where = device.torch_device
    path = Path(model)
    if path.is_file():
        path = path.parent if path.name == "config.json" else path
        if path.is_file():
            raise FlexGenError(f"{model} is not a config.json. Give a folder that has one, or that file.")
    if path.is_dir() or named_config(str(model)) is not None:
        return open_dummy(str(path if path.is_dir() else model), dtype=dtype, device=where)
    return open_without_weights(str(model), dtype=dtype, device=where)


def device_of(profile: MachineProfile) -> Device:
    """Return a device of the kind of a profile's; it need not exist here."""
    return Device(torch.device("cuda" if profile.is_gpu else "cpu"), profile.own_memory)
