"""Records how engines of earlier commands described themselves, so that a command whose answers are all known loads none."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexgen_helm.cache_folder import cache_folder, read_record, write_record
from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.deployment import EngineArguments
from flexgen_helm.types import EngineInfo, Numerics, Policy, ResolvedPolicy, StageInfo


def recall(arguments: EngineArguments) -> EngineInfo | None:
    """Return what ``Engine.describe`` said of an engine of the same arguments, files, code and machine.

    Returns:
        None where there was none, where anything is uncertain, or if the self-check is to be repeated.
    """
    if arguments.get("recheck"):
        return None
    with suppress(FlexGenError, OSError, ValueError, TypeError, KeyError):
        record = read_record(_file(arguments))
        policy: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record["policy"].items()
        }
        numerics = Numerics.from_dict(record["numerics"])
        stages = tuple(StageInfo(**stage) for stage in record["stages"])
        return EngineInfo(**{**record, "policy": ResolvedPolicy(**policy), "numerics": numerics, "stages": stages})
    return None


def remember(arguments: EngineArguments, info: EngineInfo) -> None:
    """Keep what an engine says of itself; where that fails, the next command loads it again."""
    with suppress(FlexGenError, OSError, ValueError, TypeError):
        write_record(_file(arguments), asdict(info))


def _file(arguments: EngineArguments) -> Path:
    """Name the record by everything that decides an engine's numerics."""
    decisive = json.dumps({**_of_model(arguments), **_of_surroundings(arguments)}, sort_keys=True)
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
    deciding = {name: value for name, value in arguments.items() if name != "recheck"}
    plain = {name: asdict(value) if isinstance(value, Policy) else value for name, value in deciding.items()}
    return {"weights": model_digest(folder), "arguments": json.loads(json.dumps(plain))}


def _of_surroundings(arguments: EngineArguments) -> dict[str, Any]:
    """Return the code, the device, and what row sizes, kernels and the place of attention depend on."""
    from flexgen_helm.machine.identity import code_identity, machine_identity
    from flexgen_helm.memory.device import CPU, resolve_device
    from flexgen_helm.memory.usage import total_bytes

    device = resolve_device(arguments.get("device", "auto"))
    places = (device.torch_device, CPU.torch_device) if device.is_gpu else ()
    memory = {"memory": [total_bytes(place) for place in places]}
    return {**code_identity(), **machine_identity(device.torch_device), **memory}
