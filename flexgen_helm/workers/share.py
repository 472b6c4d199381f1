"""What a worker is sent and what it sends back. Answers do not travel: they are in the journal. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from helm.benchmark.model_deployment_registry import ModelDeployment
from helm.common.cache import CacheConfig
from helm.common.request import Request, RequestResult

from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.run_record import Source
from flexgen_helm.run_stats import RunStats
from flexgen_helm.types import EngineInfo
from flexgen_helm.workers.meeting import Meeting

KERNELS = ("ATEN_", "CUBLAS_", "DNNL_", "KMP_", "MKL_", "NVIDIA_TF32", "OMP_", "ONEDNN_", "TORCH_ALLOW_TF32")
"""Beginnings of the names of environment variables that choose kernels and threads: a worker has those of the command alone."""
FILES = ("FLEXGEN_HELM_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
"""Variables that a worker takes over where the command has them."""


@dataclass(frozen=True)
class Place:
    """Where a worker finds what the command has, and how it computes as the command would."""

    working_folder: str
    """Of the command; relative paths of the deployment begin there."""
    variables: Mapping[str, str]
    """Environment variables that decide where files are and which kernels compute."""
    threads: int
    """Threads of the CPU, on which row sizes depend."""
    journals: Path
    """Folder of the suite's journals."""
    runs: tuple[str, ...]
    """Names of the command's runs."""
    meeting: Meeting
    cache: CacheConfig
    """HELM's cache, which workers only read."""


@dataclass(frozen=True)
class Share:
    """The requests that one worker answers."""

    number: int
    """From 1."""
    deployment: ModelDeployment
    requests: tuple[Request, ...]
    policy: Mapping[str, float]
    """`Numerics.policy_fields` with which the deployment was served before; empty: it was not."""
    place: Place


@dataclass(frozen=True)
class Outcome:
    """What became of a share."""

    info: EngineInfo
    stats: RunStats
    sources: tuple[Source, ...]
    """Of each request."""
    failures: Mapping[int, RequestResult]
    """Requests that cannot be answered, by their place in the share."""


@dataclass(frozen=True)
class Refusal:
    """An error of a whole share that another attempt would meet again."""

    host: str
    error: FlexGenError
