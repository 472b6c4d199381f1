"""Identity of the code and the machine that compute: what was measured under an equal identity need not be measured again."""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import flexgen_helm

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "flexgen_helm")
KERNELS = ("causal-conv1d", "flash-linear-attention", "kernels", "mamba-ssm", "triton")
"""Packages whose kernels transformers calls where they are installed."""
VARIABLES = ("ATEN_", "CUBLAS_", "DNNL_", "MKL_", "NVIDIA_TF32", "ONEDNN_", "TORCH_ALLOW_TF32")
"""Beginnings of the names of environment variables that choose kernels."""
PROCESSOR_FIELDS = ("model name", "flags", "CPU part", "Features")
"""Fields of /proc/cpuinfo that name a processor and its instructions, on x86 and on ARM."""


@cache
def code_identity() -> dict[str, Any]:
    """Return a digest of this package's source, and the versions of the libraries that compute; None: not installed."""
    digest, root = hashlib.sha256(), Path(flexgen_helm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}:".encode() + path.read_bytes())
    return {"package": digest.hexdigest(), "libraries": {name: _version(name) for name in (*LIBRARIES, *KERNELS)}}


def machine_identity(device: torch.device) -> dict[str, Any]:
    """Return the device, the processor, and what else decides which kernels run.

    Args:
        device: The device that computes.
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability(), *_processor()],
        "threads": torch.get_num_threads(),
        "variables": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a reader compares of two machines, in few words: processor, threads, and the libraries that compute.

    Args:
        device: The device that computes.
    """
    machine = machine_identity(device)
    instructions = hashlib.sha256("\n".join(machine["processor"]).encode()).hexdigest()[:16]
    named = [line.partition(":")[2].strip() for line in machine["processor"] if line.startswith(("model name", "CPU part"))]
    return {
        "processor": " ".join([platform.machine(), *named]),
        "instructions": instructions,
        "device": machine["device"],
        "threads": machine["threads"],
        "variables": machine["variables"],
        **{name: _version(name) for name in ("torch", "transformers")},
    }


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


@cache
def _processor() -> tuple[str, ...]:
    """Return the model and the instructions of the first processor; where the system does not say, what Python knows."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as stream:
        first = itertools.takewhile(str.strip, stream)
        return tuple(line.strip() for line in first if line.partition(":")[0].strip() in PROCESSOR_FIELDS)
    return (platform.processor(),)
