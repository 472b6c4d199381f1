"""Build the environment that `make` uses, once for all checkouts that need the same packages.

It lies in ``$FLEXGEN_HELM_CACHE/envs/<key>`` (default ``~/.cache/flexgen_helm``). The key is a hash of the requirements
in ``setup.cfg``, of ``constraints.txt`` and of the Python version. ``.venv`` in the checkout links to it.
"""

import configparser
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("helm", "bench", "dev")


def read_requirements() -> list[str]:
    """Return what the project, its extras and its build backend need, so that nothing is built in isolation."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    fields = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in EXTRAS)]
    build_system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    return sorted({line for field in fields for line in field.split("\n") if line} | set(build_system["requires"]))


def environment_path(requirements: list[str]) -> Path:
    """Return where the environment for these requirements and this Python lies."""
    cache = os.environ.get("FLEXGEN_HELM_CACHE") or Path.home() / ".cache" / "flexgen_helm"
    constraints = (ROOT / "constraints.txt").read_text()
    parts = [*requirements, constraints, platform.python_version(), sysconfig.get_platform()]
    return Path(cache).expanduser() / "envs" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def pip_install(path: Path, *arguments: str) -> None:
    """Run pip of the environment at ``path``, quietly."""
    pip = [str(path / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, *arguments], check=True, cwd=ROOT)


def build(path: Path, requirements: list[str]) -> None:
    """Create the environment at ``path`` unless a finished one is there.

    A virtual environment cannot be moved into place, because its scripts hold absolute paths. So a stamp is written
    last, and an environment without it is built again.
    """
    stamp = path / "complete"
    if stamp.exists():
        return
    print(f"Building the environment in {path} (several GB, only once) ...", flush=True)
    shutil.rmtree(path, ignore_errors=True)
    venv.create(path, with_pip=True)
    pip_install(path, "--constraint", "constraints.txt", *requirements)
    stamp.touch()


def install_project(path: Path) -> None:
    """Install this checkout, editable, unless the environment already points at it with the same metadata."""
    stamp = path / "project"
    state = f"{ROOT}\n{hashlib.sha256((ROOT / 'setup.cfg').read_bytes()).hexdigest()}\n"
    if stamp.exists() and stamp.read_text() == state:
        return
    stamp.unlink(missing_ok=True)
    pip_install(path, "--no-deps", "--no-build-isolation", "--editable", ".")
    stamp.write_text(state)


def link(path: Path) -> None:
    """Let ``.venv`` in the checkout be a link to the environment."""
    dot_venv = ROOT / ".venv"
    if dot_venv.is_symlink():
        dot_venv.unlink()
    elif dot_venv.exists():
        raise SystemExit(f"{dot_venv} is a folder, but make keeps a link there. Move it away and run make again.")
    dot_venv.symlink_to(path, target_is_directory=True)


def main() -> None:
    """Build, install, link."""
    requirements = read_requirements()
    path = environment_path(requirements)
    try:
        build(path, requirements)
        install_project(path)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"pip failed with exit status {error.returncode}; its message stands above.") from None
    link(path)


if __name__ == "__main__":
    main()
