"""Packs this checkout, and the packages that it needs beside torch, as wheels for a machine that reaches no registry.

The versions are those that are installed here. How to use the folder is said in README.md beside this file.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.command_line import make_parser, reports_errors
from flexgen_helm.runs.gpu_check.sizes import MIB

CHECKOUT = Path(__file__).resolve().parents[2]
ROOTS = ("flexgen-helm", "pytest", "pytest-timeout")
THERE = frozenset({"torch", "numpy"})
"""What a machine with a GPU has; what only they need is not packed either."""
PLATFORMS = [f"manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_17", "2014", "1")]
MOST_BYTES = 64 * MIB


def needed(roots: Iterable[str], python: str) -> dict[str, str]:
    """Return names and versions of the installed packages that some packages need, and theirs.

    Args:
        roots: Names of packages.
        python: Version of Python for which it is asked, such as "3.12".

    Raises:
        FlexGenError: If one is not installed here.
    """
    found: dict[str, str] = {}
    asked = [canonicalize_name(name) for name in roots]
    while asked:
        name = asked.pop()
        if name in found or name in THERE:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:
            raise FlexGenError(f"{name} is not installed here, so its version is unknown. Run `make env` first.") from None
        found[name] = package.version
        for requirement in map(Requirement, package.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python, "extra": ""}):
                asked.append(canonicalize_name(requirement.name))
    return found


def pack(folder: Path, python: str) -> int:
    """Fill a folder with wheels and return their bytes.

    Raises:
        FlexGenError: If a wheel cannot be had, or the folder becomes too large.
    """
    versions = needed(ROOTS, python)
    versions.pop("flexgen-helm")
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [word for name in PLATFORMS for word in ("--platform", name)]
    with tempfile.TemporaryDirectory() as name:  # building leaves files that a later build would take in
        copy = shutil.copytree(CHECKOUT, Path(name, "checkout"), ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
        _pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(copy))
    named = [f"{name}=={version}" for name, version in sorted(versions.items())]
    _pip("download", "--quiet", "--no-deps", *target, "--dest", str(folder), *named)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    if num_bytes > MOST_BYTES:
        raise FlexGenError(
            f"{folder} has {num_bytes / MIB:.0f} MiB, and {MOST_BYTES // MIB} are allowed. Empty it and pack anew."
        )
    return num_bytes


def _pip(*arguments: str) -> None:
    ended = subprocess.run([sys.executable, "-m", "pip", *arguments], check=False, stderr=subprocess.PIPE, text=True)
    if ended.returncode:
        raise FlexGenError(f"pip {arguments[0]} failed. {ended.stderr.strip()}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser: argparse.ArgumentParser = make_parser("gpu_check.bring", __doc__)
    parser.add_argument("folder", type=Path, help="for the wheels")
    own = ".".join(platform.python_version_tuple()[:2])
    parser.add_argument("--python", default=own, metavar="VERSION", help=f"Python of the other machine ({own})")
    return parser.parse_args(arguments)


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    options = parse()
    print(f"{options.folder}: {pack(options.folder, options.python) / MIB:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
