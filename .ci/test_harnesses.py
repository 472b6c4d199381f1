"""Run the tests of the adapters of other harnesses, each with the newest version of its harness: ``make test-harnesses``.

What a harness requires may clash with what HELM requires. So each has an environment of its own, made once, in
``$FLEXGEN_HELM_CACHE/overlays/<environment>/<extra>-<key>``. Behind its own packages it sees those of the main one, torch
above all.
"""

import configparser
import hashlib
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

from environment import ROOT, environment_path, install_project, pip_install, read_requirements

TESTS = {"inspect": "tests/harnesses/test_inspect.py", "lm-eval": "tests/harnesses/test_lm_eval.py"}
"""The tests of each harness, by its extra."""


def requirements(extra: str) -> list[str]:
    """Return what an extra of setup.cfg requires."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return sorted(filter(None, config["options.extras_require"][extra].split("\n")))


def packages(path: Path) -> Path:
    """Return the folder of an environment's packages."""
    return path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def build(extra: str) -> Path:
    """Return the environment of a harness, which is made if it is not there yet, with this checkout in it."""
    main, needed = environment_path(read_requirements()), requirements(extra)
    key = hashlib.sha256("\n".join(needed).encode()).hexdigest()[:12]
    path = main.parents[1] / "overlays" / main.name / f"{extra}-{key}"
    if not (path / "complete").exists():
        print(
            f"Building the environment of {extra} in {path} (only once; pip may name conflicts with packages that only the "
            "main environment needs) ...",
            flush=True,
        )
        shutil.rmtree(path, ignore_errors=True)
        venv.create(path)
        # A path in such a file comes behind the environment's own packages.
        (packages(path) / "main.pth").write_text(f"{packages(main)}\n")
        pip_install(path, *needed)
        (path / "complete").touch()
    install_project(path)
    return path


def passes(extra: str) -> bool:
    """Run the tests of a harness in its environment."""
    path, begin = build(extra), time.monotonic()
    process = subprocess.run([str(path / "bin" / "python"), "-m", "pytest", "-q", TESTS[extra]], cwd=ROOT, check=False)
    passed = process.returncode == 0
    print(f"{extra}: {'passed' if passed else 'failed'} in {time.monotonic() - begin:.0f} s", flush=True)
    return passed


def main() -> int:
    """Test the harnesses that were named by their extras, or all; return 1 if any fails."""
    unknown = set(sys.argv[1:]) - set(TESTS)
    if unknown:
        raise SystemExit(f"There is no harness {', '.join(sorted(unknown))}. Name {' or '.join(TESTS)}.")
    try:
        failed = [extra for extra in sys.argv[1:] or TESTS if not passes(extra)]
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"pip failed with exit status {error.returncode}; its message stands above.") from None
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
