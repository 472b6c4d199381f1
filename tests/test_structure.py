"""The shape of the package: dependencies point one way, folders and files stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import flexgen_helm

PACKAGE = Path(flexgen_helm.__file__).parent
LAYERS = (
    *("errors", "types", "run_stats", "options", "processes", "cache_folder"),
    *("statistics", "memory", "machine", "kv_cache", "model", "loading", "generation"),
    *("schedule", "compression", "attention", "execution", "policy", "rows", "distributed", "runtime"),
    *("fidelity", "harnesses", "helm", "workers", "reports", "gate", "assets", "plugin", "evaluation", "benchmark"),
    *("cli_options", "cli", "__main__"),
)
"""Folders and files of the package. Each may use those before it, and none behind it."""
LAZY = {("__init__", "runtime"), ("__init__", "evaluation")}
"""`flexgen_helm.Engine` and `flexgen_helm.evaluate` are imported at their first use, so that the plugin needs no torch."""
WITHOUT_TORCH = (
    "plugin",
    "evaluation.suites_command",
    "evaluation.python",
    "reports.runs",
    "statistics.flips",
    "statistics.margins",
    "statistics.power",
    "compression.config",
    "schedule.packed",
    "schedule.single",
    "schedule.dependencies",
    "kv_cache.pages",
    "machine.profile_file",
    "machine.named_rates",
    "attention.visits",
    "attention.row_pages",
    "policy.memory_plan",
    "policy.planner.search.choose",
    "policy.planner.search.gains",
    "policy.planner.search.frontier",
    "policy.bound",
    "policy.capacity",
    "policy.stages.balance",
    "policy.stages.row_travel",
    "policy.planner.simulate",
    "policy.planner.signature",
    "policy.planner.pipeline.scaling",
)
"""What HELM lists, and what a cost model or a simulator of schedules imports."""
MOST_LINES = 400
MOST_FILES = 22


def modules(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def layer_of(module: str) -> str:
    """The folder or file under the package that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == PACKAGE.name:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module.count(".") < 2 else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name)


def arrows() -> Iterator[tuple[Path, str, str]]:
    """Every import of another layer: the file, its layer and the other one."""
    for path in modules(PACKAGE):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imports(path):
            there = layer_of(module)
            if there != here:
                yield path, here, there


def test_every_folder_and_file_has_its_place() -> None:
    found = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found - {"__init__"} == set(LAYERS)


def test_dependencies_point_one_way() -> None:
    upwards = [
        f"{path.relative_to(PACKAGE)} imports {there}"
        for path, here, there in arrows()
        if here != "__init__" and there in LAYERS and LAYERS.index(there) > LAYERS.index(here)
    ]
    assert not upwards


def test_no_circle_within_a_folder() -> None:
    """Arrows between folders cannot close a circle; those within one can."""
    for folder in (PACKAGE / name for name in LAYERS if (PACKAGE / name).is_dir()):
        needs = {
            path.stem: {module.split(".")[2] for module in imports(path) if module.split(".")[1:2] == [folder.name]}
            for path in modules(folder)
        }
        while free := [name for name, others in needs.items() if not others & needs.keys()]:
            for name in free:
                del needs[name]
        assert not needs, f"files of {folder.name} that need each other: {sorted(needs)}"


def test_only_the_package_itself_is_lazy() -> None:
    assert {(here, there) for _, here, there in arrows() if here == "__init__" and there in LAYERS[4:]} == LAZY


def test_plans_and_schedules_need_no_torch() -> None:
    names = ", ".join(f"{PACKAGE.name}.{module}" for module in WITHOUT_TORCH)
    code = f"import {names}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_and_folders_are_small() -> None:
    root = Path(__file__).parents[1]
    large = {
        str(path.relative_to(root)): lines
        for folder in (root / "flexgen_helm", root / "runs", root / "scenarios", root / "tests")
        for path in modules(folder)
        if (lines := path.read_text().count("\n")) > MOST_LINES
    }
    assert not large
    counts = {path.parent: len(list(path.parent.glob("*.py"))) for path in PACKAGE.rglob("__init__.py")}
    assert max(counts.values()) <= MOST_FILES


def test_the_architecture_pages_picture_shows_every_folder_in_order() -> None:
    page = (Path(__file__).parents[1] / "docs/architecture.md").read_text()
    picture = page.split("```")[1]
    names = [re.split(r"  {2,}", line)[0].split() for line in picture.strip().splitlines()]
    shown = [name for line in reversed(names) for name in line]
    assert sorted(shown) == sorted(LAYERS)
    places = {name: i for i, line in enumerate(reversed(names)) for name in line}
    assert not [
        f"{path.relative_to(PACKAGE)} imports {there}"
        for path, here, there in arrows()
        if here != "__init__" and there in places and places[there] > places[here]
    ]


def test_the_architecture_page_names_files_that_exist() -> None:
    page = (Path(__file__).parents[1] / "docs/architecture.md").read_text()
    named = re.findall(r"`([a-z_]+/[a-z_]+\.py)`", page)
    assert len(named) > 20
    assert [name for name in named if not (PACKAGE / name).is_file() and name != "tests/test_structure.py"] == []
