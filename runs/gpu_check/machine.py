"""What machine it is, and in which versions."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.usage import total_bytes
from flexgen_helm.runs.gpu_check.sizes import Sizes

PACKAGES = ("torch", "transformers", "triton", "numpy", "greenlet", "pytest")


def describe_machine(sizes: Sizes) -> dict[str, Any]:
    """Return names, amounts and versions; a package that is missing has the version "missing"."""
    return {
        "GPU": torch.cuda.get_device_name() if sizes.device == "cuda" else "none",
        "GPU memory": gib(total_bytes(sizes.torch_device)),
        "driver": _driver(),
        "CUDA of torch": torch.version.cuda,
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads of torch": torch.get_num_threads(),
        "RAM": gib(total_bytes(torch.device("cpu"))),
        "locked memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "kernel": platform.release(),
        "Python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
