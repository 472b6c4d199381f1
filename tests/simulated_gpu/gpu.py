"""The simulated GPU: what it was asked to do, who may touch which memory when, and what went wrong."""

from __future__ import annotations

import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple

import flexgen_helm
from tests.simulated_gpu.allocator import GIB, Block, CachingAllocator
from tests.simulated_gpu.clocks import Access, Agent, Clock, Region, Spans

PACKAGE = f"{Path(flexgen_helm.__file__).parent}/"
Kind = Literal["launch", "copy", "wait"]
"""A kernel, a copy between host and device, or a wait of a host thread for the device."""
Shapes = tuple[tuple[int, ...], ...]
Parts = Sequence[tuple[Region, Spans]]
"""Bytes of regions that a piece of work touches."""


class Size(NamedTuple):
    """How much a kernel or a copy does.

    Attributes:
        num_bytes: Bytes that a kernel reads and writes, or that a copy carries.
        shapes: Of a product's operands.
        itemsize: Bytes of an element of a product's operands.
    """

    num_bytes: int = 0
    shapes: Shapes = ()
    itemsize: int = 0


NO_SIZE = Size()


class Event(NamedTuple):
    """Something that the device was asked to do, or that a thread waited for.

    Attributes:
        kind: See `Kind`.
        what: The operator, or the kind of copy.
        thread: Name of the host thread that asked.
        site: The line of the package that asked.
        size: How much it is.
    """

    kind: Kind
    what: str
    thread: str
    site: str
    size: Size = NO_SIZE


class DeviceMemory(Region):
    """Memory on the device; it is freed when the last tensor that views it dies."""

    def __init__(self, gpu: SimulatedGpu, num_bytes: int, stream: Agent) -> None:
        super().__init__("device memory", num_bytes)
        self.gpu, self.stream = gpu, stream
        self.recorded: set[Agent] = set()
        """Streams that ``record_stream`` named."""
        self.awaited: Clock = {}
        """Steps of streams for which a thread waited that held this memory: whoever frees it then, they are over."""
        self.block: Block | None = gpu.allocator.allocate(num_bytes, stream) if num_bytes else None

    def __del__(self) -> None:
        if hasattr(self, "block"):  # else there was no room for it
            self.gpu.free(self)


class SimulatedGpu:
    """One device. Every method may be called from any thread."""

    def __init__(self, total: int = 80 * GIB, *, shapes_only: bool = False) -> None:
        """Make a device that is idle.

        Args:
            total: Bytes of its memory.
            shapes_only: Whether large tensors have a form and no content, so that models have their real size on a small
                machine. Accesses are not compared then.
        """
        self.shapes_only = shapes_only
        self.allocator = CachingAllocator(total)
        self.log: list[Event] = []
        self.races: Counter[str] = Counter()
        """Accesses that are not ordered behind an earlier one."""
        self.hazards: Counter[str] = Counter()
        """Memory that was freed or unpinned while a stream may still have used it."""
        self.mismatches: Counter[str] = Counter()
        """Operators with operands on different devices."""
        self.lock = threading.RLock()
        self.default_stream = Agent("0", is_stream=True)
        self.streams = [self.default_stream]
        self.pinned: dict[int, Region] = {}
        """Pinned host memory by its address."""
        self._local = threading.local()
        self._freed: deque[Block] = deque()

    @property
    def faults(self) -> Counter[str]:
        """Everything that went wrong, with how often it was seen."""
        return self.races + self.hazards + self.mismatches

    @property
    def thread(self) -> Agent:
        """The host thread that asks."""
        if not hasattr(self._local, "agent"):
            self._local.agent = Agent(threading.current_thread().name, is_stream=False)
        found: Agent = self._local.agent
        return found

    @property
    def stream(self) -> Agent:
        """The current stream of the thread that asks."""
        return getattr(self._local, "stream", self.default_stream)

    @stream.setter
    def stream(self, stream: Agent) -> None:
        self._local.stream = stream

    def new_stream(self) -> Agent:
        """Make a stream."""
        with self.lock:
            self.streams.append(Agent(f"{len(self.streams)} made in {self.site()}", is_stream=True))
            return self.streams[-1]

    def site(self) -> str:
        """The innermost line of the package in the stack, or of the tests."""
        frame: FrameType | None = sys._getframe(1)
        outside = ""
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(PACKAGE):
                return f"{name[len(PACKAGE) :]}:{frame.f_lineno}"
            if not outside and "/tests/" in name and "/simulated_gpu/" not in name:
                outside = f"tests/{name.split('/tests/')[-1]}:{frame.f_lineno}"
            frame = frame.f_back
        return outside or "outside of the package"

    def take(self, num_bytes: int) -> DeviceMemory:
        """Allocate device memory for the current stream.

        Raises:
            torch.OutOfMemoryError: If there is none left.
        """
        with self.lock:
            self.settle()
            return DeviceMemory(self, num_bytes, self.stream)

    def free(self, memory: DeviceMemory) -> None:
        """Take device memory back. Whoever gets it next on its stream is ordered behind that stream alone."""
        for access in memory.accesses:
            ordered = memory.stream.knows(access) or self.thread.knows(access) or not access.agent.is_stream
            ordered |= memory.awaited.get(access.agent, -1) >= access.step
            if not ordered and access.agent not in memory.recorded:
                self.hazards[f"memory of {memory.stream} is freed while {access}"] += 1
        if memory.block is not None:
            self._freed.append(memory.block)  # not into the allocator: a garbage collection may have interrupted it

    def settle(self) -> None:
        """Hand freed memory to the allocator."""
        with self.lock:
            while self._freed:
                self.allocator.free(self._freed.popleft())

    def run(self, kind: Kind | None, what: str, reads: Parts, writes: Parts, *, size: Size = NO_SIZE) -> Agent:
        """Append work to the current stream, behind all that this thread knows.

        Args:
            kind: As what it is noted; None: it is not.
            what: The operator, or the kind of copy.
            reads: Memory that it reads.
            writes: Memory that it writes.
            size: How much it is.

        Returns:
            The stream.
        """
        with self.lock:
            stream, site = self.stream, self.site()
            stream.learn(self.thread.known)
            self._step(stream, f"{what} at {site}", reads, writes)
        if kind is not None:
            self.log.append(Event(kind, what, threading.current_thread().name, site, size))
        return stream

    def touch(self, what: str, region: Region, spans: Spans, *, writes: bool) -> None:
        """Let this host thread read or write pinned memory."""
        with self.lock:
            parts = [(region, spans)]
            self._step(self.thread, f"{what} at {self.site()}", [] if writes else parts, parts if writes else [])

    def wait(self, clock: Clock, what: str) -> None:
        """Let this host thread wait until what a clock holds is over."""
        with self.lock:
            self.thread.learn(clock)
        self.log.append(Event("wait", what, threading.current_thread().name, self.site()))

    def finish(self, stream: Agent, what: str, held: Iterable[DeviceMemory]) -> None:
        """Let this host thread wait for a stream while it holds device memory."""
        step = stream.known[stream]
        self.wait(stream.known, what)
        for memory in held:
            memory.awaited[stream] = step

    def pin(self, address: int, num_bytes: int) -> int:
        """Make host memory pinned; returns CUDA's status."""
        with self.lock:
            if self.pinned_at(address) is not None:
                return 712  # cudaErrorHostMemoryAlreadyRegistered
            self.pinned[address] = Region("pinned memory", num_bytes, address)
            return 0

    def unpin(self, address: int, *, watched: bool = False) -> None:
        """Make pinned memory ordinary, which is unmapped then; torch's own pinned memory is watched until copies have ended."""
        with self.lock:
            for access in self.pinned.pop(address, Region("", 0)).accesses:
                if access.agent.is_stream and not watched and not self.thread.knows(access):
                    self.hazards[f"pinned memory is given back in {self.site()} while {access}"] += 1

    def pinned_at(self, address: int) -> Region | None:
        """The pinned memory that an address is in."""
        for begin, region in list(self.pinned.items()):
            if begin <= address < begin + region.num_bytes:
                return region
        return None

    def _step(self, agent: Agent, what: str, reads: Parts, writes: Parts) -> None:
        count = agent.step()
        if self.shapes_only:
            return
        for parts, is_write in ((reads, False), (writes, True)):
            for region, spans in parts:
                if spans:
                    new = Access(agent, count, is_write, spans, what)
                    for old in region.add(new):
                        self.races[f"{region.kind}: {new}, not ordered behind: {old}"] += 1
