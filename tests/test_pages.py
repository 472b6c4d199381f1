"""Every page of the documentation: its commands, YAML and snippets run, or are listed here with the reason why they do not.

Those of README.md and docs/evaluating.md, which need real data, are run by tests/test_docs.py; those of docs/reports.md by
tests/reports/test_documented.py, and those of docs/gate.md by tests/gate/test_page.py, on runs that cost nothing; those of
docs/harnesses.md by tests/harnesses, in environments of their own.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from flexgen_helm.cli import main
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.runtime.trace import title
from flexgen_helm.types import RESOURCES
from tests.models import save_tiny
from tests.tokenizers import save_character_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = {"README.md", "evaluating.md", "reports.md", "gate.md", "harnesses.md"}
"""Pages whose blocks tests/test_docs.py, tests/reports, tests/gate/test_page.py and tests/harnesses run."""
NOT_RUN = {
    "flexgen-helm profile": "measures for half a minute; tests/runtime/planning/test_machine_profile.py runs it",
    "flexgen-helm plan --model facebook/opt-175b": "half a minute; tests/runtime/planning/test_pipeline_command.py plans less",
    "flexgen-helm plan --replay": "needs the record of a run; tests/runtime/planning/test_explain.py has one",
    "flexgen-helm eval --model path/to/model --suite mmlu --workers": "needs Ray; tests/workers/test_ray.py runs two workers",
    "FLEXGEN_HELM_WORKERS=2 helm-run": "the same",
    "ray start": "the same",
    "torchrun --nproc-per-node 2 -m": "real questions; tests/distributed/test_helm.py runs a suite over two stages",
    "torchrun --nnodes": "needs four machines",
    "pip install": "it builds an environment",
    "flexgen-helm bench --model facebook/opt-30b": "a model of the hub, on a GPU of 15 GiB",
}
"""Beginnings of the commands that no test runs, with the reason."""
NO_COMMANDS = {("architecture.md", ""): "a drawing", ("evaluating.md", ""): "a file of run entries"}
"""Blocks without a language that hold something else than commands."""
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class Block(NamedTuple):
    """One fenced block of a page."""

    page: str
    language: str
    file: str | None
    """The name that stands before it, as in "`local/model_deployments.yaml`:"."""
    text: str

    @property
    def commands(self) -> list[str]:
        """Commands of a shell block, those over several lines joined."""
        if (self.page, self.language) in NO_COMMANDS or self.language not in ("", "sh"):
            return []
        return self.text.replace("\\\n", "").splitlines()


def blocks(page: Path) -> list[Block]:
    pattern = r"(?:`([\w/]+\.\w+)`:\n)?^```(\w*)\n(.*?)^```$"
    found = re.findall(pattern, page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [Block(page.name, language, file or None, text) for file, language, text in found]


BLOCKS = [block for page in PAGES for block in blocks(page)]
WITH_BLOCKS = sorted({block.page for block in BLOCKS} - RUN_ELSEWHERE - {page for page, _ in NO_COMMANDS})


def reason_not_to_run(command: str) -> str | None:
    return next((reason for beginning, reason in NOT_RUN.items() if command.startswith(beginning)), None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that has a chat template, and a text, at `path/to`, as working directory."""
    model = save_tiny("qwen3", tmp_path / "path")
    save_character_tokenizer(model)
    (model / "chat_template.jinja").write_text(CHAT)
    (tmp_path / "path" / "to").mkdir()
    model.rename(tmp_path / "path" / "to" / "model")
    (tmp_path / "path" / "to" / "text.txt").write_text("The capital of France is Paris. " * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_is_of_a_known_language_and_every_yaml_has_a_name_and_a_command() -> None:
    assert {block.language for block in BLOCKS} == {"", "sh", "python", "yaml", "json"}
    for here, after in zip(BLOCKS, [*BLOCKS[1:], None], strict=True):
        if here.language == "yaml" and here.page not in RUN_ELSEWHERE - {"evaluating.md"}:
            (deployment,) = yaml.safe_load(here.text)["model_deployments"]
            assert here.file == "local/model_deployments.yaml"
            assert after is not None
            assert (after.page, after.language) == (here.page, "sh")
            assert f"model={deployment['name']}" in after.text
            assert "--local-path local" in after.text


def test_what_is_not_run_is_there() -> None:
    commands = [command for block in BLOCKS for command in block.commands]
    for beginning in NOT_RUN:
        assert any(command.startswith(beginning) for command in commands), beginning


def test_run_entries_are_complete() -> None:
    """With `model=`, and the first argument behind a colon."""
    for page in PAGES:
        entries = re.findall(r"`((?:lambada|perplexity|xsum_rouge)[:,][^`]*)`", page.read_text(encoding="utf-8"))
        for entry in entries:
            assert entry == "lambada,model=text" or re.fullmatch(r"\w+:(\w+=[^,]+,)*model=[^,]+", entry), (page.name, entry)


@pytest.mark.parametrize("page", WITH_BLOCKS)
@pytest.mark.timeout(300)
def test_every_command_and_snippet_runs(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in (block for block in BLOCKS if block.page == page):
        if block.file is not None:
            (folder / block.file).parent.mkdir(exist_ok=True)
            (folder / block.file).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        for command in block.commands:
            if reason_not_to_run(command) is None:
                run(command)
                capsys.readouterr()
    if "engine" in names:
        names["engine"].close()


def run(command: str) -> None:
    """Runs a command in the working directory: ours in this process, HELM's in one of its own."""
    program, *arguments = shlex.split(command, comments=True)
    if program == "flexgen-helm":
        arguments += ["--num-prompts", "4", "--prompt-len", "8", "--gen-len", "2"] if arguments[0] == "bench" else []
        assert main(arguments) == 0, command
        return
    if program == "torchrun":
        start("torch.distributed.run", *arguments)
        return
    assert program == "helm-run", command
    pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")
    arguments[arguments.index("-m") + 1] = "2"
    start("helm.benchmark.run", *arguments)
    assert list(Path("benchmark_output/runs").glob("*/*/stats.json")), command
    assert list(Path("path/to/slabs").glob("*.slab")), "the deployment's policy was not applied"


def start(module: str, *arguments: str) -> None:
    """Runs a module in a process of its own."""
    finished = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, (module, arguments, finished.stdout[-2000:], finished.stderr[-2000:])


MESSAGES = re.findall(r"^\| `(.*?)`", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


def texts_of_the_source() -> list[str]:
    """Returns every string of the package as a reader would see it, with `{}` where values are put in."""
    found = []
    for path in (ROOT / "flexgen_helm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_of_the_page_of_errors_are_those_of_the_source() -> None:
    texts = texts_of_the_source()
    assert len(MESSAGES) > 20
    for message in MESSAGES:
        parts = [part.strip() for part in message.split("...") if part.strip()]
        for part in parts:
            assert any(part in text for text in texts), (message, part)


def test_the_table_of_defaults_is_true() -> None:
    text = (ROOT / "docs" / "offloading.md").read_text(encoding="utf-8")
    step = 16 * torch.get_num_threads()
    for name, *shown in re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \|$", text, flags=re.MULTILINE):
        large, small, gpu = map(int, shown)
        rounded = [-(-size // step) * step if name != "num_gpu_batches" else size for size in (large, small)]
        assert rounded == [getattr(resolved(None, CPU, few_requests=few), name) for few in (False, True)]
        assert {getattr(resolved(None, Device(torch.device("cuda")), few_requests=few), name) for few in (False, True)} == {gpu}


def test_the_legend_of_the_timeline_names_every_row_and_operation(folder: Path) -> None:
    text = (ROOT / "docs" / "benchmarking.md").read_text(encoding="utf-8")
    legend = set(re.findall(r"`([^`]*)`", text[text.index("## Timelines") :]))
    assert {"sweeps", "device waits", *map(title, RESOURCES)} <= legend
    policy = "weights=0:0:1,cache=0:0:1,hidden=0:0:1"
    run(f'flexgen-helm generate --model path/to/model --prompt "The capital" --policy {policy} --trace out.json')
    events = json.loads((folder / "out.json").read_text())["traceEvents"]
    names = {event["name"].split()[0] for event in events if event["ph"] == "X"} - {"sweep"}
    assert {"compute", "load_weights", "store_cache", "load_hidden"} <= names <= {name.split()[0] for name in legend if name}
