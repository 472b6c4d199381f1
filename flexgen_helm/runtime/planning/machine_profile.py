"""The profile of this machine: measured at first use, kept in the cache folder, and used again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from flexgen_helm.cache_folder import cache_folder, locked
from flexgen_helm.errors import FlexGenError, UnsupportedModel
from flexgen_helm.loading.dummy_weights import make_first_layers
from flexgen_helm.loading.source import ModelSource, dtype_name
from flexgen_helm.machine.identity import machine_identity
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.machine.profile_file import read_profile, write_profile
from flexgen_helm.memory.device import Device
from flexgen_helm.model.compiled.layers import by_inductor
from flexgen_helm.model.layers import layer_kinds, layers_of
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.policy.measure import LayerShapes, Say, measure_machine, measure_model
from flexgen_helm.policy.measure_attention import Heads
from flexgen_helm.policy.measure_products import layer_matrices
from flexgen_helm.policy.planner.signature import signature
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.policy.shapes_of_model import plain_formats, setting, shapes_of
from flexgen_helm.rows.layer_times import FORMS, MeasuredModel, layer_times
from flexgen_helm.runtime.free_space import make_folder
from flexgen_helm.runtime.precise_products import PRECISE_PRODUCTS
from flexgen_helm.types import Policy, ResolvedPolicy

logger = logging.getLogger(__name__)

PROFILE_VERSION = 3
"""Version of what is measured and how; raised whenever kept profiles do not hold any more."""
TINY_ROW = 16
"""Tokens of a row whose layer calls take their fixed time and little else."""


@dataclass(frozen=True)
class Subject:
    """The model for which a machine is measured.

    Attributes:
        source: The model; its weights are not read.
        policy: Row sizes.
        compiled: Whether its layers are compiled.
    """

    source: ModelSource
    policy: ResolvedPolicy
    compiled: bool = False

    @property
    def signature(self) -> str:
        """See `flexgen_helm.policy.planner.signature`."""
        whole = self.source.empty
        return signature(shapes_of(whole, plain_formats(whole), self.source.dtype))

    @property
    def key(self) -> dict[str, Any]:
        """What a kept profile depends on beside the machine."""
        return {
            "model": self.signature,
            "dtype": dtype_name(self.source.dtype),
            "rows": [self.policy.gpu_batch_size, self.policy.gpu_batch_tokens],
            **({"compiled": True} if self.compiled else {}),
        }


def kept_profile(device: Device, subject: Subject, *, folder: Path | None = None) -> MachineProfile | None:
    """Return the profile of this machine for a model if it was measured before; see `machine_profile`."""
    folder = cache_folder() if folder is None else folder
    if not folder.exists():
        return None
    return _Kept(device, folder, again=False, say=logger.info).read(subject.key)


def machine_profile(
    device: Device,
    *,
    subject: Subject | None = None,
    folder: Path | None = None,
    say: Say = logger.info,
    say_part: Say | None = None,
    again: bool = False,
) -> MachineProfile:
    """Return the profile of this machine, measured at the first use with equal processor, device, threads, versions and disk.

    One process measures at a time, for two would measure each other; another one waits, and takes what was measured meanwhile.

    Args:
        device: The device that computes.
        subject: A model: products and attention are measured at its sizes, and its layers for its rows. None: standard sizes.
        folder: Folder on the disk that is measured; made if it is missing. None: the cache folder.
        say: Told if anything is measured.
        say_part: Told what is measured next. None: nobody is.
        again: Whether to measure though there is a kept profile.

    Raises:
        FlexGenError: If the disk cannot be measured, or the model cannot be made.
    """
    folder = cache_folder() if folder is None else folder
    make_folder(folder)
    say_part = say_part or (lambda part: None)
    kept = _Kept(device, folder, again, say)
    with device.current(), PRECISE_PRODUCTS.hold():
        machine = kept.get({}, "this machine", partial(_measure_machine, device, folder, say_part))
        if subject is None:
            return machine
        measure = partial(_measure_subject, machine, device, subject, say_part)
        return kept.get(subject.key, f"{subject.source.name} on this machine", measure)


@dataclass(frozen=True)
class _Kept:
    """Profiles in the cache folder."""

    device: Device
    folder: Path
    again: bool
    say: Say

    def get(self, key: dict[str, Any], what: str, measure: Callable[[], MachineProfile]) -> MachineProfile:
        """Return a kept profile, or measure and keep it."""
        file = self._file(key)
        found = self._read(file)
        if found is not None:
            return found
        with self._alone():
            found = self._read(file)  # measured while this process waited
            if found is not None:
                return found
            self.say(f"measuring {what}, once: it takes up to a minute")
            profile = measure()
            with suppress(FlexGenError):
                write_profile(profile, file)
            return profile

    def read(self, key: dict[str, Any]) -> MachineProfile | None:
        """Return a kept profile; None: there is none."""
        return self._read(self._file(key))

    def _read(self, file: Path) -> MachineProfile | None:
        if not self.again:
            with suppress(FlexGenError):
                return read_profile(file)
        return None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other process measure this machine meanwhile."""
        file = self._file({}).with_suffix(".lock")
        with ExitStack() as stack:
            # A cache folder that cannot be written, or has no locks, costs measurements and no more.
            with suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                waits = partial(self.say, f"waiting for another process, which measures this machine ({file})")
                stack.enter_context(locked(file, say_waits=waits))
            yield

    def _file(self, key: dict[str, Any]) -> Path:
        decisive = {
            **key,
            **machine_identity(self.device.torch_device),
            "own_memory": self.device.own_memory,
            "disk": self.folder.stat().st_dev,
            "torch": torch.__version__,
            "version": PROFILE_VERSION,
        }
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]
        return cache_folder() / "profiles" / f"{digest}.json"


def _measure_machine(device: Device, folder: Path, say: Say) -> MachineProfile:
    profile = measure_machine(device, folder, say)
    say("layer calls")
    policy = resolved(Policy(gpu_batch_size=TINY_ROW, gpu_batch_tokens=TINY_ROW), device)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
    )
    source = ModelSource("tiny", None, config, None, torch.float32, device.torch_device)
    calls = list(layer_times(dummy_layers(source, device, "tiny"), policy, device, cold=False, forms=FORMS[:1]))
    by_processor = {found.kind: found.processor.seconds for found in calls if found.processor is not None}
    return replace(
        profile,
        call_seconds={found.kind: found.seconds for found in calls},
        processor_call_seconds=by_processor,
    )


def _measure_subject(machine: MachineProfile, device: Device, subject: Subject, say: Say) -> MachineProfile:
    whole, policy = subject.source.empty, subject.policy
    shapes = shapes_of(whole, plain_formats(whole), subject.source.dtype)
    layer = max(layers_of(whole), key=lambda layer: sum(parameter.numel() for parameter in layer.parameters()))
    sizes = LayerShapes(
        layer_matrices(layer, setting(whole, "num_experts_per_tok")),
        Heads(shapes.num_heads, shapes.num_kv_heads, shapes.head_dim),
        sorted({16, policy.gpu_batch_size, policy.gpu_batch_tokens}),
    )
    profile = measure_model(machine, device, subject.source.dtype, sizes, say)
    say(f"layers of {subject.source.name}")
    try:
        model = dummy_layers(subject.source, device, signature(shapes), compiled=subject.compiled)
        layers = list(layer_times(model, policy, device))
    except UnsupportedModel as error:
        say(f"its layers are not measured, because in packed rows {error}")
        layers = []
    return replace(profile, layers=tuple(layers))


def dummy_layers(source: ModelSource, device: Device, name: str, *, compiled: bool = False) -> MeasuredModel:
    """Return the first layers of a model, with random weights.

    Args:
        source: The model; its weights are not read.
        device: The device.
        name: Signature of the model's sizes.
        compiled: Whether layers are compiled.

    Raises:
        UnsupportedModel: If the model does not run in packed rows, or its layers cannot be compiled.
    """
    first = make_first_layers(source.config, dtype=source.dtype, device=device.torch_device)
    model = RecordedModel(first, compiled=by_inductor() if compiled else None)
    return MeasuredModel(model, name, layer_kinds(source.empty, layers_of(source.empty)))
