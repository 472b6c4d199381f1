"""Processes that are connected by a slow network on one machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flexgen_helm.policy.planner.pipeline.network import Network
from flexgen_helm.runs.memory_limit.cgroup import NotPermitted
from flexgen_helm.runs.slow_network.relay import DEVICE, address_of

MTU = 16000
"""Bytes of a packet. A row of a small model is a few of them, so TCP's slow start costs nothing that a plan does not know."""
PORT = 29500


@dataclass(frozen=True)
class Nodes:
    """Network namespaces, one for each rank, which a network of a given rate and latency connects."""

    namespaces: tuple[str, ...]

    def command(self, rank: int, command: Sequence[str]) -> list[str]:
        """Return the command that runs another one on a node."""
        return ["nsenter", f"--net={self.namespaces[rank]}", *command]

    def environment(self, rank: int, port: int = PORT) -> dict[str, str]:
        """Return what torch.distributed needs to know on a node."""
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(self.namespaces)),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": address_of(0),
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": DEVICE,
        }

    def start(
        self, rank: int, command: Sequence[str], *, environment: Mapping[str, str] | None = None, stdout: Path, stderr: Path
    ) -> subprocess.Popen[bytes]:
        """Start a process on a node; what it prints goes to files."""
        variables = {**os.environ, **self.environment(rank), **(environment or {})}
        with stdout.open("wb") as out, stderr.open("wb") as err:
            return subprocess.Popen(
                self.command(rank, command), env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )


def reason_against() -> str | None:
    """Return why namespaces cannot be made here; None: nothing is known to speak against it."""
    missing = [name for name in ("nsenter", "ip") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} cannot be found"
    if not Path("/dev/net/tun").exists():
        return "there are no TUN devices (/dev/net/tun)"
    return None if os.geteuid() == 0 else "network namespaces with devices need root"


@contextmanager
def slow_network(count: int, network: Network, *, mtu: int = MTU) -> Iterator[Nodes]:
    """Make nodes with a slow network between them. They are gone behind the block, and if this process is killed.

    Args:
        count: Number of nodes.
        network: Rate of each node's connection, and latency between any two.
        mtu: Bytes of a packet.

    Raises:
        NotPermitted: If they cannot be made, with the reason.
    """
    if (reason := reason_against()) is not None:
        raise NotPermitted(f"A slow network cannot be made: {reason}. Run it as root, where network namespaces are permitted.")
    given = [str(count), repr(network.rate), repr(network.latency)]
    relay = subprocess.Popen(
        [sys.executable, "-m", "flexgen_helm.runs.slow_network.relay", *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert relay.stdin is not None
    assert relay.stdout is not None
    try:
        said = json.loads(relay.stdout.readline() or b'{"error": "its process ended"}')
        if "error" in said:
            raise NotPermitted(
                f"A slow network cannot be made: {said['error']}. Run it as root, where network namespaces are permitted."
            )
        nodes = Nodes(tuple(said["namespaces"]))
        for rank in range(count):
            _set_up(nodes, rank, mtu)
        yield nodes
    finally:
        relay.stdin.close()
        relay.wait()
        relay.stdout.close()


def _set_up(nodes: Nodes, rank: int, mtu: int) -> None:
    """Give a node its address.

    Raises:
        NotPermitted: If that fails.
    """
    for command in (
        "ip link set lo up",
        f"ip addr add {address_of(rank)}/24 dev {DEVICE}",
        f"ip link set {DEVICE} mtu {mtu} up",
    ):
        done = subprocess.run(nodes.command(rank, command.split()), check=False, capture_output=True, text=True)
        if done.returncode:
            raise NotPermitted(f"A slow network cannot be made: `{command}` said {done.stderr.strip()!r}.")
