"""Run the tests that depend on `transformers` with other versions of it: ``make test-versions``.

Each version lies over the environment (`overlay.py`).
"""

import subprocess
import sys
import time

from environment import ROOT, read_requirements
from overlay import variables
from packaging.requirements import Requirement

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


def passes(version: str) -> bool:
    """Run the tests with this version."""
    begin = time.monotonic()
    # The tests stop if the version that they import is another one; see tests/conftest.py.
    environment = {**variables(f"transformers=={version}"), "FLEXGEN_HELM_TRANSFORMERS": version}
    process = subprocess.run([sys.executable, *PYTEST, *TESTS], cwd=ROOT, env=environment, check=False)
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
