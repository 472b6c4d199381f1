"""One measurement: `bench` on every node of a slow network."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flexgen_helm.errors import FlexGenError
from flexgen_helm.options import parse_policy
from flexgen_helm.policy.planner.pipeline.network import Network
from flexgen_helm.runs.slow_network.namespaces import slow_network

POLL_SECONDS = 0.2
LAST_LINES = 15


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: Folder of the model.
        stages: Number of processes.
        threads: Threads of each.
        num_jobs: Number of prompts.
        prompt_len: Tokens of each.
        gen_len: New tokens of each.
        policy: Policy as `--policy` reads it.
        timeout: Most seconds of a measurement.
        dummy_weights: Whether weights are random, so that a config is enough.
        profile: Profile of each stage's machine, by which layers are divided; None: by their products and bytes.
    """

    model: Path
    stages: int
    threads: int
    num_jobs: int
    prompt_len: int
    gen_len: int
    policy: str
    timeout: float
    dummy_weights: bool = False
    profile: Path | None = None

    def bench(self, lanes: int) -> list[str]:
        """Return the arguments of `bench` with so many sweeps in flight."""
        asked = replace(parse_policy(self.policy), num_lanes=lanes)
        policy = {each.name: getattr(asked, each.name) for each in fields(asked) if getattr(asked, each.name) != each.default}
        sizes = {"--num-prompts": self.num_jobs, "--prompt-len": self.prompt_len, "--gen-len": self.gen_len}
        named = [text for name, value in sizes.items() for text in (name, str(value))]
        named += ["--dummy-weights"] if self.dummy_weights else []
        named += ["--profile", str(self.profile.absolute())] if self.profile else []
        return [
            "bench",
            "--model",
            str(self.model),
            "--dtype",
            "float32",
            "--device",
            "cpu",
            "--policy",
            json.dumps(policy),
            *named,
        ]


def measure(setting: Setting, network: Network, lanes: int) -> dict[str, Any]:
    """Run a benchmark over a slow network; returns what `bench --json` printed.

    Args:
        setting: What is measured.
        network: The network.
        lanes: Sweeps in flight.

    Raises:
        NotPermitted: If such a network cannot be made here.
        FlexGenError: If a process fails, with the end of what it printed.
    """
    command = [sys.executable, "-m", "flexgen_helm", *setting.bench(lanes), "--warm-up", "--json"]
    with tempfile.TemporaryDirectory() as folder, slow_network(setting.stages, network) as nodes:
        files = [(Path(folder, f"out{rank}"), Path(folder, f"err{rank}")) for rank in range(setting.stages)]
        threads = {"OMP_NUM_THREADS": str(setting.threads)}
        ranks = [
            nodes.start(rank, command, environment=threads, stdout=out, stderr=err) for rank, (out, err) in enumerate(files)
        ]
        try:
            failed = _first_failure(ranks, setting.timeout)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if failed is not None:
            said = files[failed][1].read_text(errors="replace").splitlines()[-LAST_LINES:]
            raise FlexGenError(f"Process {failed} of the pipeline failed or took too long:\n" + "\n".join(said))
        found: dict[str, Any] = json.loads(files[0][0].read_text().splitlines()[-1])
        return found


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]], timeout: float) -> int | None:
    """Wait for all processes; returns the number of one that failed or did not end in time, None if none did."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        codes = [rank.poll() for rank in ranks]
        bad = [number for number, code in enumerate(codes) if code]
        if bad:
            return bad[0]
        if None not in codes:
            return None
        time.sleep(POLL_SECONDS)
    return next((number for number, rank in enumerate(ranks) if rank.poll() is None), None)
