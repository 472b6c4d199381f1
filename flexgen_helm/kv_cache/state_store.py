"""State store: keeps transformers' own caches of some sequences on the host while no layer uses them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flexgen_helm.memory.link import Link, Transfer
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.spans.span import Activity
from flexgen_helm.types import Resource


class OwnedState(NamedTuple):
    """The state that one layer keeps for one sequence, such as a layer of transformers' cache."""

    owner: Hashable
    """The sequence."""
    content: object
    """Object with tensors as attributes, directly or in lists and dictionaries."""


class _Spot(NamedTuple):
    """A place that holds a tensor: an entry of a dictionary or list."""

    holder: Any
    key: Any


class StateStore:
    """Moves whole states between device and host: to the device before a layer is called, to the host after it."""

    def __init__(self, device: torch.device, *, share: float, meter: Meter | None = None) -> None:
        """Move nothing before the first call.

        Args:
            device: Device on which layers are computed.
            share: Share of the sequences whose states are stored on the host; they are spread evenly.
            meter: Measures the transfers.
        """
        self._device, self._share = device, share
        self._meter = Meter(device) if meter is None else meter
        self._link = Link(device, "cache")
        self._rests: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
        """Whether a sequence's states are stored on the host."""
        self._seen = self._placed = 0
        self._last: Transfer | None = None

    def load(self, j: int, states: Sequence[OwnedState]) -> Transfer | None:
        """Start to bring the states that layer j keeps for some sequences to the device; return None if all are there."""
        moved = [state.content for state in states if self._on_host(state.owner) or self._is_elsewhere(state.content)]
        return self._submit("host_to_device", Activity("load_cache", str(j)), moved, self._device)

    def store(self, j: int, states: Sequence[OwnedState]) -> Transfer | None:
        """Start to bring the states of layer j back to the host; return None if all stay on the device."""
        moved = [state.content for state in states if self._on_host(state.owner)]
        return self._submit("device_to_host", Activity("store_cache", str(j)), moved, torch.device("cpu"))

    def wait(self, arriving: Transfer) -> None:
        """Let the computation that follows see states that `load` brings."""
        with self._meter.waiting():
            arriving.wait()

    def settle(self) -> None:
        """Wait until states that are on their way have arrived, so that the host may read them.

        Raises the error of the last transfer if it failed.
        """
        last, self._last = self._last, None
        if last is not None:
            last.wait()
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Stop moving states."""
        self._link.close()

    def _is_elsewhere(self, content: object) -> bool:
        """Return whether a state is not on the device. A copy of a state that is stored on the host begins on the host."""
        return any(holder[key].device.type != self._device.type for holder, key in _spots(content))

    def _on_host(self, owner: Hashable) -> bool:
        if owner not in self._rests:
            self._seen += 1
            self._rests[owner] = self._placed < self._share * self._seen
            self._placed += self._rests[owner]
        return self._rests[owner]

    def _submit(self, resource: Resource, activity: Activity, moved: list[object], target: torch.device) -> Transfer | None:
        if not moved:
            return None

        computing = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

        def move() -> None:
            spots = [spot for content in moved for spot in _spots(content)]
            with self._meter.span(resource, activity, sum(spot.holder[spot.key].nbytes for spot in spots)):
                for holder, key in spots:
                    holder[key] = _copied(holder[key], target, computing)

        self._last = self._link.submit(move)
        return self._last


def _copied(x: Tensor, target: torch.device, computing: torch.cuda.Stream | None) -> Tensor:
    """Start to copy a tensor; from a GPU it comes into pinned memory of torch's own, whose copies nobody waits for."""
    copied = x.to(target, copy=True, non_blocking=True)
    if computing is not None:
        if x.is_cuda:
            x.record_stream(torch.cuda.current_stream(x.device))  # this copy reads it after it is freed
        if copied.is_cuda:
            copied.record_stream(computing)  # it is freed there
    return copied


def _spots(content: object) -> Iterator[_Spot]:
    holder = content if isinstance(content, dict | list) else getattr(content, "__dict__", {})
    for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
        if isinstance(value, Tensor):
            yield _Spot(holder, key)
        elif isinstance(value, dict | list):
            yield from _spots(value)
