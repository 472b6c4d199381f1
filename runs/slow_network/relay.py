"""A network between namespaces of this machine with a rate and a delay: a process that passes packets on when they are due.

Each node is a network namespace with one TUN device, from which this process reads packets. A packet leaves its node at the
rate of that node's connection, behind those before it, and arrives a fixed time later. Nothing is lost. The kernel's own means
for that, ``tc netem``, is missing from many kernels; TUN devices are not.

The namespaces belong to this process. It ends, and they with it, when its standard input is closed.

Command: ``python -m flexgen_helm.runs.slow_network.relay NODES BYTES_PER_SECOND SECONDS``
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import struct
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from heapq import heappop, heappush
from typing import NamedTuple

DEVICE = "flex0"
"""Name of the device in each namespace."""
CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000
PACKET_BYTES = 65536
AT_ONCE = 64
"""Most packets that are read from one device before the others have their turn."""
PRIORITY = -10
"""What this process adds to its niceness, as far as it may: packets should not wait for computation."""


class Node(NamedTuple):
    """A namespace and its device, as file descriptors."""

    namespace: int
    device: int


def address_of(rank: int) -> str:
    """Return the address of a node."""
    return f"10.77.0.{rank + 1}"


def make_node() -> Node:
    """Make a namespace with a device in it; this thread is in it from now on.

    Raises:
        OSError: If that is not permitted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    namespace = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22s", DEVICE.encode(), IFF_TUN | IFF_NO_PI, b""))
    return Node(namespace, device)


def make_nodes(count: int) -> list[Node]:
    """Make so many namespaces, each in a thread of its own, since a thread is in one namespace.

    Raises:
        OSError: If that is not permitted.
    """
    found: list[Node] = []
    failed: list[OSError] = []

    def make() -> None:
        try:
            found.append(make_node())
        except OSError as error:
            failed.append(error)

    for _ in range(count):
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
    if failed:
        raise failed[0]
    return found


def relay(devices: Sequence[int], rate: float, latency: float, stop: int) -> None:
    """Pass packets on until there is something to read from a file that is closed.

    Args:
        devices: Devices of the nodes, in their order.
        rate: Bytes per second that a node sends.
        latency: Seconds from then until a packet arrives.
        stop: The file.
    """
    by_address = {bytes(map(int, address_of(rank).split("."))): device for rank, device in enumerate(devices)}
    free = dict.fromkeys(devices, 0.0)
    due: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        ready, _, _ = select.select([stop, *devices], [], [], wait)
        if stop in ready and not os.read(stop, 1):
            return
        for device in (each for each in ready if each != stop):
            for packet in _packets(device):
                to = by_address.get(packet[16:20]) if packet[0] >> 4 == 4 else None
                if to is None:  # what nodes say to find each other, which TUN devices need not
                    continue
                count += 1
                free[device] = max(time.monotonic(), free[device]) + len(packet) / rate
                heappush(due, (free[device] + latency, count, to, packet))
        while due and due[0][0] <= time.monotonic():
            _, _, to, packet = heappop(due)
            with suppress(OSError):  # a device that is not up yet loses it, as a network does
                os.write(to, packet)


def _packets(device: int) -> list[bytes]:
    found: list[bytes] = []
    with suppress(BlockingIOError):
        while len(found) < AT_ONCE:
            found.append(os.read(device, PACKET_BYTES))
    return found


def main() -> int:
    """Make the nodes, say where they are, and pass packets on."""
    count, rate, latency = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    try:
        nodes = make_nodes(count)
    except OSError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    with suppress(OSError):
        os.nice(PRIORITY)
    print(json.dumps({"namespaces": [f"/proc/{os.getpid()}/fd/{node.namespace}" for node in nodes]}), flush=True)
    relay([node.device for node in nodes], rate, latency, sys.stdin.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
