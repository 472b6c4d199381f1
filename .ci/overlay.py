"""Lay a package over the environment: without what the environment has already, torch above all.

It is installed once into ``$FLEXGEN_HELM_CACHE/overlays/<environment>/<name>-<version>``, which comes first on ``PYTHONPATH``,
so that the processes of tests see it too.
"""

import os
import shutil
import sys
from importlib.metadata import distributions
from pathlib import Path

from environment import ROOT, environment_path, pip_install, read_requirements
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def missing(folder: Path) -> list[str]:
    """Return what the packages in a folder require and neither it nor the environment has."""
    versions: dict[str, str] = {}
    for package in distributions(path=[str(folder), *sys.path]):
        versions.setdefault(canonicalize_name(package.name), package.version)
    required = [Requirement(line) for package in distributions(path=[str(folder)]) for line in package.requires or ()]
    return [
        f"{requirement.name}{requirement.specifier}"
        for requirement in required
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not requirement.specifier.contains(versions.get(canonicalize_name(requirement.name), "0"), prereleases=True)
    ]


def overlay(requirement: str) -> Path:
    """Return the folder with a package, named as ``transformers==5.20.0``, which is installed there if it is not yet."""
    environment = environment_path(read_requirements())
    folder = environment.parents[1] / "overlays" / environment.name / requirement.replace("==", "-")
    stamp = folder / "complete"
    if stamp.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    print(f"Installing {requirement} into {folder} (only once) ...", flush=True)
    needed = [requirement]
    for _ in range(2):  # itself, then what its range asks for in other versions than the environment's
        if needed:
            pip_install(ROOT / ".venv", "--no-deps", "--target", str(folder), *needed)
        needed = missing(folder)
    if needed:
        raise SystemExit(f"{requirement} requires {', '.join(needed)}, which could not be laid over the environment.")
    stamp.touch()
    return folder


def variables(requirement: str) -> dict[str, str]:
    """Return the environment variables of a process that sees the package."""
    path = [str(overlay(requirement)), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
