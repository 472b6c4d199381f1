"""Run the tests of suites over Ray workers: ``make test-ray``. Ray lies over the environment (`overlay.py`)."""

import subprocess
import sys

from environment import ROOT
from overlay import variables

RAY = "ray==2.60.0"
PYTEST = ("-m", "pytest", "-q", "tests/workers/test_ray.py")


def main() -> int:
    """Return the exit status of the tests."""
    try:
        environment = variables(RAY)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"pip failed with exit status {error.returncode}; its message stands above.") from None
    return subprocess.run([sys.executable, *PYTEST], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
