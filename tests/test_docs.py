"""The commands of docs/evaluating.md and README.md, in order, in a folder that holds what the text says it holds."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from tests.models import save_tiny
from tests.tokenizers import save_character_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "evaluating.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
FILES = dict(re.findall(r"`([\w/]+\.(?:conf|yaml))`:\n```\w*\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL))
README = (ROOT / "README.md").read_text(encoding="utf-8")
README_BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
README_SNIPPETS = [block for language, block in README_BLOCKS if language == "python"]
README_COMMANDS = [
    *"".join(block.replace("\\\n", "") for language, block in README_BLOCKS if language in ("", "sh")).splitlines(),
    *re.findall("`(flexgen-helm .*?)`", README),
]
INSTALLERS = ("make", "pip")
"""What the commands of the README that are not run begin with: these build an environment."""
MODULES = {
    "flexgen-helm": "flexgen_helm.cli",
    "helm-run": "helm.benchmark.run",
    "helm-summarize": "helm.benchmark.presentation.summarize",
    "helm-server": "helm.benchmark.server",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model at `path/to/model` and the files that the text shows."""
    model = save_tiny("qwen3", tmp_path / "path")
    save_character_tokenizer(model)
    (tmp_path / "path" / "to").mkdir()
    model.rename(tmp_path / "path" / "to" / "model")
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def as_process(command: str, folder: Path) -> list[str]:
    """Returns a command for this interpreter, with two instances of each run entry."""
    words = shlex.split(command.replace("/abs/path", str(folder / "path")), comments=True)
    if "-m" in words and words[0] in MODULES:
        words[words.index("-m") + 1] = "2"
    elif words[:2] == ["flexgen-helm", "eval"]:
        words += ["-m", "2"]
    return [sys.executable, *(words[1:] if words[0] == "python" else ["-m", MODULES[words[0]], *words[1:]])]


def test_the_text_has_commands_and_files() -> None:
    assert {command.split()[0] for command in COMMANDS} == {*MODULES, "python"}
    assert len(SNIPPETS) == 1
    assert set(FILES) == {"my_suite/run_entries.conf", "local/model_deployments.yaml"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("real_model")
def test_every_command_runs(folder: Path) -> None:
    for command in COMMANDS:
        process = as_process(command, folder)
        if "helm.benchmark.server" in process:
            assert_serves(process, folder)
        else:
            finished = subprocess.run(process, cwd=folder, capture_output=True, text=True, check=False)
            assert finished.returncode == 0, (command, finished.stdout[-2000:], finished.stderr[-2000:])
    for snippet in SNIPPETS:
        subprocess.run([sys.executable, "-c", snippet], cwd=folder, check=True)
    runs = folder / "benchmark_output" / "runs"
    assert {path.name: len(list(path.glob("*/stats.json"))) for path in runs.iterdir() if path.is_dir()} == {
        "quickstart": 6,
        "my_suite": 2,
        "v1": 2,
    }
    assert_said_files_exist(folder / "benchmark_output")


def test_the_readme_has_commands_and_a_snippet() -> None:
    assert {command.split()[0] for command in README_COMMANDS} == {*INSTALLERS, "flexgen-helm", "helm-run"}
    assert len(README_SNIPPETS) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("real_model")
def test_every_command_of_the_readme_runs(folder: Path) -> None:
    processes = [as_process(with_model(command, folder), folder) for command in README_COMMANDS if not is_installer(command)]
    processes += [[sys.executable, "-c", with_model(snippet, folder)] for snippet in README_SNIPPETS]
    for process in processes:
        finished = subprocess.run(process, cwd=folder, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, (process, finished.stdout[-2000:], finished.stderr[-2000:])
        assert finished.stdout.strip(), process
    runs = folder / "benchmark_output" / "runs"
    assert {path.name for path in runs.iterdir() if list(path.glob("*/stats.json"))} == {"quickstart", "v1"}


def with_model(text: str, folder: Path) -> str:
    """Returns a command or snippet of the README for the model of the folder."""
    return re.sub("path/or/hub-name|<org>/<model>", str(folder / "path" / "to" / "model"), text)


def is_installer(command: str) -> bool:
    return command.split()[0] in INSTALLERS


def assert_serves(process: list[str], folder: Path) -> None:
    """Starts the server, reads what a browser would, and stops the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([*process, "--port", str(port)], cwd=folder, stdout=subprocess.DEVNULL) as server:
        try:
            assert read(f"http://127.0.0.1:{port}/benchmark_output/runs/v1/groups.json", patience_s=60)
        finally:
            server.terminate()


def read(url: str, patience_s: float) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + patience_s
    while True:
        try:
            content: bytes = opener.open(url, timeout=10).read()
            return content
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def assert_said_files_exist(output: Path) -> None:
    """Looks for every path of the table of files."""
    table = TEXT[TEXT.index("## Where everything is") :]
    paths = re.findall(r"`((?:runs|scenarios|prod_env)/[^`]*)`", table)
    assert len(paths) == 6
    for path in paths:
        assert list(output.glob(re.sub("<.*?>", "*", path))), (path, os.listdir(output))
