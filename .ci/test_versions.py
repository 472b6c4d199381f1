"""Run the tests that depend on `transformers` with other versions of it: ``make test-versions``.

Each version is installed once into ``$FLEXGEN_HELM_CACHE/overlays/<environment>/transformers-<version>``, without what the
environment has already (torch above all), and comes first on ``PYTHONPATH``, so that the processes of tests see it too.
"""

import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

from environment import ROOT, environment_path, pip_install, read_requirements
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXACTNESS, EQUALITY = "tests/runtime/test_exactness.py", "tests/helm/test_equality.py"
PACKED = ("llama", "gemma2", "qwen3_moe", "llama4_text")
"""Dense, windows with softcaps, mixture of experts, and positions that come from the cache."""
CUT = ("llama", "llama4_text", "mixtral")
"""Layers that are compiled: dense, with a cache among their arguments, and with experts."""
SINGLE = ("falcon", "mpt", "falcon_h1")
"""Own attention code, no positions, and state beside attention."""
TESTS = (
    "tests/loading/test_versions.py",
    "tests/model/test_cache_argument.py",
    "tests/model/test_compiled.py",
    *(f"tests/runtime/test_compiled_layers.py::test_cut_layers_have_the_bits_of_whole_ones[{family}]" for family in CUT),
    "tests/survey/test_survey.py::test_short_form_agrees_with_the_page",
    *(f"{EXACTNESS}::test_level_c[{family}]" for family in PACKED),
    *(f"{EXACTNESS}::test_level_c_in_single_rows[{family}]" for family in SINGLE),
    *(f"{EXACTNESS}::test_level_b_neighbours_and_order[{family}]" for family in (*PACKED, *SINGLE)),
    f"{EQUALITY}::test_every_kind_of_entry",
    f"{EQUALITY}::test_a_real_model_on_few_instances",
)
PYTEST = ("-m", "pytest", "-q", "--numprocesses", "2", "--dist", "loadfile")


def lowest_version() -> str:
    """Return the lowest version that setup.cfg allows."""
    requirement = next(line for line in map(Requirement, read_requirements()) if line.name == "transformers")
    return next(bound.version for bound in requirement.specifier if bound.operator == ">=")


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


def overlay(version: str) -> Path:
    """Return the folder with this version, which is installed there if it is not yet."""
    environment = environment_path(read_requirements())
    folder = environment.parents[1] / "overlays" / environment.name / f"transformers-{version}"
    stamp = folder / "complete"
    if stamp.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    print(f"Installing transformers {version} into {folder} (only once) ...", flush=True)
    needed = [f"transformers=={version}"]
    for _ in range(2):  # itself, then what its range asks for in other versions than the environment's
        if needed:
            pip_install(ROOT / ".venv", "--no-deps", "--target", str(folder), *needed)
        needed = missing(folder)
    if needed:
        raise SystemExit(f"transformers {version} requires {', '.join(needed)}, which could not be laid over the environment.")
    stamp.touch()
    return folder


def passes(version: str) -> bool:
    """Run the tests with this version."""
    begin = time.monotonic()
    path = [str(overlay(version)), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The tests stop if the version that they import is another one; see tests/conftest.py.
    variables = {"PYTHONPATH": os.pathsep.join(path), "FLEXGEN_HELM_TRANSFORMERS": version}
    process = subprocess.run([sys.executable, *PYTEST, *TESTS], cwd=ROOT, env={**os.environ, **variables}, check=False)
    passed = process.returncode == 0
    print(f"transformers {version}: {'passed' if passed else 'failed'} in {time.monotonic() - begin:.0f} s", flush=True)
    return passed


def main() -> int:
    """Test the versions that were named, or the lowest one; return 1 if any fails."""
    try:
        failed = [version for version in sys.argv[1:] or [lowest_version()] if not passes(version)]
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"pip failed with exit status {error.returncode}; its message stands above.") from None
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
