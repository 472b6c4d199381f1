"""A slow network on one machine: what is sent takes no less time than its rate and latency say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_helm.policy.planner.pipeline.network import Network
from flexgen_helm.runs.memory_limit.cgroup import NotPermitted
from flexgen_helm.runs.slow_network import namespaces
from flexgen_helm.runs.slow_network.__main__ import Outcome, table
from flexgen_helm.runs.slow_network.namespaces import Nodes, slow_network

NETWORK = Network(rate=4e6, latency=0.05)
SENT = 400_000
"""Bytes that take a tenth of a second."""
SERVER = f"""
import socket
listener = socket.create_server(("10.77.0.1", 29500))
print("listening", flush=True)
one, _ = listener.accept()
one.sendall(one.recv(1))
count = 0
while count < {SENT}:
    count += len(one.recv(65536))
one.sendall(b"x")
"""
CLIENT = f"""
import json, socket, time
one = socket.create_connection(("10.77.0.1", 29500))
one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
begin = time.monotonic()
one.sendall(b"x")
one.recv(1)
there = time.monotonic()
one.sendall(bytes({SENT}))
one.recv(1)
print(json.dumps([there - begin, time.monotonic() - there]))
"""
GLOO = f"""
import json, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, data = dist.get_rank(), torch.zeros({SENT}, dtype=torch.uint8)
one = torch.zeros(1, dtype=torch.uint8)
if rank == 0:
    dist.send(one, 1)
    dist.recv(one, 1)
    begin = time.monotonic()
    dist.send(data, 1)
    dist.recv(one, 1)
    print(json.dumps(time.monotonic() - begin))
else:
    dist.recv(one, 0)
    dist.send(one, 0)
    dist.recv(data, 0)
    dist.send(one, 0)
dist.destroy_process_group()
"""


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    try:
        with slow_network(2, NETWORK) as made:
            yield made
    except NotPermitted as error:
        pytest.skip(str(error))


def test_bytes_take_their_time(nodes: Nodes, tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    server = nodes.start(0, [sys.executable, "-c", SERVER], stdout=out, stderr=err)
    try:
        while not out.read_bytes() and server.poll() is None:
            time.sleep(0.02)
        client = nodes.command(1, [sys.executable, "-c", CLIENT])
        done = subprocess.run(client, check=True, capture_output=True, text=True, timeout=60)
        assert server.wait(timeout=60) == 0, err.read_text()
    finally:
        server.kill()
        server.wait()
    there_and_back, transfer = json.loads(done.stdout)
    assert there_and_back >= 2 * NETWORK.latency
    assert transfer >= SENT / NETWORK.rate + 2 * NETWORK.latency


def test_nodes_are_gone_behind_the_block(nodes: Nodes) -> None:
    with slow_network(1, NETWORK) as others:
        relay = Path(others.namespaces[0]).parents[1]
        assert relay.exists()
        assert len(set(map(os.stat, (*others.namespaces, *nodes.namespaces)))) == 3
    assert not relay.exists()


@pytest.mark.slow
def test_gloo_sends_over_it(nodes: Nodes, tmp_path: Path) -> None:
    ranks = [
        nodes.start(rank, [sys.executable, "-c", GLOO], stdout=tmp_path / f"out{rank}", stderr=tmp_path / f"err{rank}")
        for rank in range(2)
    ]
    try:
        codes = [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0, 0], (tmp_path / "err0").read_text()
    assert json.loads((tmp_path / "out0").read_text()) >= SENT / NETWORK.rate + 2 * NETWORK.latency


def test_what_is_not_permitted_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces.shutil, "which", lambda name: None if name == "ip" else name)
    with pytest.raises(NotPermitted, match="ip cannot be found"), slow_network(2, NETWORK):
        pass


def test_a_table_has_what_was_measured_beside_the_plan() -> None:
    outcomes = [Outcome("1Gbit/s,10ms", 2, 30.0, 33.0, "stage 0 device"), Outcome("1Gbit/s,10ms", 1, 20.0, 18.0, "lanes")]
    assert [row.split(" | ")[1:6] for row in table(outcomes)[2:]] == [
        ["2", "30.00", "33.00", "1.10", "1.50"],
        ["1", "20.00", "18.00", "0.90", "1.00"],
    ]
