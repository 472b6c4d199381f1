"""Records how engines of earlier commands described themselves, so that a command whose answers are all known loads none."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flexgen_helm
from flexgen_helm.cache_folder import cache_folder
from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.deployment import EngineArguments
from flexgen_helm.types import EngineInfo, Numerics, Policy, ResolvedPolicy

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


def recall(arguments: EngineArguments) -> EngineInfo | None:
    """Return what ``Engine.describe`` said of an engine of the same arguments, files, code and machine.

    Returns:
        None where there was none, or where anything is uncertain.
    """
    with suppress(FlexGenError, OSError, ValueError, TypeError, KeyError):
        record = json.loads(_file(arguments).read_text(encoding="utf-8"))
        policy: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record["policy"].items()
        }
        numerics = Numerics.from_dict(record["numerics"])
        return EngineInfo(**{**record, "policy": ResolvedPolicy(**policy), "numerics": numerics})
    return None


def remember(arguments: EngineArguments, info: EngineInfo) -> None:
    """Keep what an engine says of itself; where that fails, the next command loads it again."""
    with suppress(FlexGenError, OSError, ValueError, TypeError):
        file = _file(arguments)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(asdict(info), indent=1), encoding="utf-8")
        temporary.replace(file)


def _file(arguments: EngineArguments) -> Path:
    """Name the record by everything that decides an engine's numerics."""
    decisive = json.dumps({**_of_model(arguments), **_of_code(), **_of_machine(arguments)}, sort_keys=True)
    return cache_folder() / "engines" / f"{hashlib.sha256(decisive.encode()).hexdigest()[:32]}.json"


def _of_model(arguments: EngineArguments) -> dict[str, Any]:
    """Return the digest of the model's files as they are now, and the arguments.

    Raises:
        ValueError: The weights are made up.
    """
    from flexgen_helm.loading.digest import model_digest
    from flexgen_helm.loading.hub_folder import folder_without_weights

    if arguments.get("dummy_weights"):
        raise ValueError("nothing is known of weights that are made up")
    folder = folder_without_weights(arguments["name_or_path"], arguments.get("revision"))
    plain = {name: asdict(value) if isinstance(value, Policy) else value for name, value in arguments.items()}
    return {"weights": model_digest(folder), "arguments": json.loads(json.dumps(plain))}


@cache
def _of_code() -> dict[str, Any]:
    """Return versions of libraries, and a digest of this package: which rows a model runs in is decided by its code."""
    digest, root = hashlib.sha256(), Path(flexgen_helm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}:".encode() + path.read_bytes())
    return {"package": digest.hexdigest(), "libraries": {name: version(name) for name in LIBRARIES}}


def _of_machine(arguments: EngineArguments) -> dict[str, Any]:
    """Return the device, and what row sizes, kernels and the place of attention depend on."""
    import torch

    from flexgen_helm.memory.device import CPU, resolve_device
    from flexgen_helm.memory.usage import total_bytes

    device = resolve_device(arguments.get("device", "auto"))
    places = (device.torch_device, CPU.torch_device) if device.is_gpu else ()
    return {
        "device": torch.cuda.get_device_name(device.torch_device) if device.is_gpu else device.torch_device.type,
        "memory": [total_bytes(place) for place in places],
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "threads": torch.get_num_threads(),
    }
