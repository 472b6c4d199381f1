"""Parts that are commands: the tests marked gpu, and benchmarks of a model larger than the device."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from flexgen_helm.memory.amounts import gib
from flexgen_helm.runs.gpu_check.sizes import Sizes

MARK = "mark.gpu"
TESTS = Path("tests")
"""Below the folder of the command."""
RATES = ("throughput", "prefill_rate", "decode_rate", "latency_seconds", "load_seconds", "roofline_efficiency")


def run_tests(sizes: Sizes) -> dict[str, Any]:
    """Run the tests marked gpu; only their files are read, which is much quicker."""
    files = sorted(str(path) for path in TESTS.rglob("test_*.py") if MARK in path.read_text(encoding="utf-8"))
    if not files:
        return {"missing": f"There are no tests in {TESTS.absolute()}. Run the command in a checkout."}
    status, output = _run("pytest", "-m", "gpu", "-rfE", "-p", "no:cacheprovider", *sizes.pytest, *files)
    return {"status": status, "summary": output.splitlines()[-1] if output else ""}


def bench(kind: str, sizes: Sizes) -> dict[str, Any]:
    """Run ``flexgen-helm bench`` with dummy weights.

    Args:
        kind: Name of the field of `Sizes` with the workload.
        sizes: Model, limits and workload.
    """
    return _bench([*sizes.bench, *getattr(sizes, kind)])


def compare_compiled(sizes: Sizes) -> dict[str, Any]:
    """Run the same benchmark of a resident model with layers as they are, and with compiled ones."""
    ways = {"as they are": [], "compiled": ["--compile-layers"]}
    return {"layers": [{"layers": name, **_bench([*sizes.resident, *options])} for name, options in ways.items()]}


def _bench(options: list[str]) -> dict[str, Any]:
    status, output = _run("flexgen_helm.cli", "bench", "--dummy-weights", *options, "--json")
    if status:
        return {"status": status}
    found = json.loads(output)
    stats, engine = found["stats"], found["engine"]
    return {
        "options": " ".join(options),
        **{name: found[name] for name in RATES},
        **{f"GB/s {link}": rate for link, rate in found["gb_per_second"].items()},
        "peak": gib(stats["peak_bytes"]),
        "attention": engine["numerics"]["machine"]["attention"],
        "bit_stable": engine["bit_stable"],
        "measurement": found,
    }


generate, score = (partial(bench, kind) for kind in ("generation", "scoring"))


def compare_caches(sizes: Sizes) -> dict[str, Any]:
    """Run ``cache_tiers`` with the cache on the host."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "result.json")
        status, _ = _run("flexgen_helm.runs.cache_tiers", *sizes.cache_tiers, "--json", str(file))
        lines = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return {"status": status, "variants": [{**line.pop("link_bytes"), **line} for line in lines]}


def _run(module: str, *arguments: str) -> tuple[int, str]:
    """Run a module in a process of its own, and return its status and what it printed, which goes to our log meanwhile."""
    command = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", module, *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines).strip()
