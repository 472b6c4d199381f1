"""Single rows: one sequence a row, with a cache of transformers and the model's own attention.

For models that keep state beside attention, attend in their own way or take positions from elsewhere. Layers are still recorded
and replayed, so that each layer's weights are touched once for all rows of a block; nothing is shared between sequences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache

from flexgen_helm.errors import PolicyError
from flexgen_helm.kv_cache.state_store import OwnedState, StateStore
from flexgen_helm.memory.link import Transfer
from flexgen_helm.model.cache_argument import cache_parameter
from flexgen_helm.model.recorder import RecordedModel, Recording
from flexgen_helm.rows.lockstep import run_in_lockstep
from flexgen_helm.schedule.rows import Row, Segment, State, Sweep
from flexgen_helm.types import Shares


@dataclass(kw_only=True)
class SingleRecording(Recording):
    """A recorded row of one sequence."""

    state: State
    arriving: dict[int, Transfer | None] = field(default_factory=dict)
    """By layer, what was started to bring its cache."""


@dataclass
class JointRecording:
    """Decoding sequences side by side: a recording for each, of one token."""

    hidden_moves: ClassVar[bool] = False
    """Each part keeps its own, which is small."""
    parts: list[SingleRecording]
    size: int
    """Tokens with which the weights meet; what is missing is padding."""
    arriving: dict[int, Transfer | None] = field(default_factory=dict)
    hidden: Tensor | None = None
    """Nothing: see `hidden_moves`."""

    @property
    def tokens(self) -> Tensor:
        """Their hidden states: ``[sequences, ...]``."""
        return torch.cat([part.tokens for part in self.parts])


class SingleRows:
    """Computes rows of one sequence each. Sequences that decode are computed side by side."""

    def __init__(self, model: RecordedModel, store: StateStore | None = None) -> None:
        """Leave the model as transformers made it, but for the order in which its layers are called.

        Args:
            model: The model.
            store: Moves caches that rest on the host; None: all stay on the device.

        Raises:
            UnsupportedModel: If it takes no cache.
        """
        self.model, self._store = model, store
        model.use(model.own)
        self._cache_parameter = cache_parameter(model)

    @property
    def num_layers(self) -> int:
        """Layers that every row goes through."""
        return len(self.model.layers)

    @property
    def can_be_halved(self) -> bool:
        """Caches have grown already."""
        return False

    def reserve(self, sweep: Sweep) -> None:
        """Caches grow as they are filled; those that begin as copies need what the last sweep stored."""
        if self._store is not None:
            self._store.settle()

    def record(self, row: Row) -> SingleRecording | JointRecording:
        """Note how the layers would be called for a row; caches are filled when they are."""
        parts = [self._record(segment) for segment in row.segments]
        return JointRecording(parts, row.size) if row.kind == "decode" else parts[0]

    def load_cache(self, j: int, recording: SingleRecording | JointRecording) -> Transfer | None:
        """Start to bring what layer j keeps for a row's sequences to the device; the layer waits for it."""
        if self._store is None:
            return None
        if j not in recording.arriving:
            recording.arriving[j] = self._store.load(j, _states(j, recording))
        return recording.arriving[j]

    def store_cache(self, j: int, recording: SingleRecording | JointRecording) -> Transfer | None:
        """Start to bring it back to where it rests; must follow every replay."""
        return None if self._store is None else self._store.store(j, _states(j, recording))

    def replay(self, j: int, recording: SingleRecording | JointRecording) -> None:
        """Run layer j on a row."""
        arriving = self.load_cache(j, recording)
        if arriving is not None:
            arriving.wait()
        if isinstance(recording, Recording):
            self.model.replay(j, recording)
            return
        calls = [partial(self.model.replay, j, part) for part in recording.parts]
        run_in_lockstep(self.model.layers[j], calls, size=recording.size)

    def use_suspender(self, suspend: Callable[[], None]) -> None:
        """Ignore it: the model's own attention never waits for the CPU."""

    def bad_tokens(self, recording: SingleRecording | JointRecording) -> None:
        """Nothing: a sequence's cache is its own, and what is not finite in it reaches its logits as in transformers."""

    def close(self) -> None:
        """Stop moving caches."""
        if self._store is not None:
            self._store.close()

    def finish(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[P, ...]`` of the last layer, of any rows, to logits ``[P, vocab]``."""
        return self.model.finish(hidden)

    def _record(self, segment: Segment) -> SingleRecording:
        assert segment.state is not None
        ids = torch.tensor([segment.tokens], device=self.model.device)
        cache = self._cache(segment.state)
        return self.model.record(
            SingleRecording(state=segment.state),
            input_ids=ids,
            position_ids=torch.arange(segment.start, segment.end, device=ids.device)[None],
            use_cache=True,
            **{self._cache_parameter: cache},
        )

    def _cache(self, state: State) -> DynamicCache:
        if state.content is None:
            origin = state.origin.content if state.origin is not None else None
            config = self.model.model.config.get_text_config(decoder=True)
            state.content = copy.deepcopy(origin) if origin is not None else DynamicCache(config=config)
            state.origin = None
        assert isinstance(state.content, DynamicCache)
        return state.content


def _states(j: int, recording: SingleRecording | JointRecording) -> list[OwnedState]:
    """What layer j keeps for each sequence of a row."""
    states = [part.state for part in (recording.parts if isinstance(recording, JointRecording) else [recording])]
    caches = [(state, state.content) for state in states]
    return [
        OwnedState(state, cache.layers[j])
        for state, cache in caches
        if isinstance(cache, DynamicCache) and j < len(cache.layers)
    ]


def check_cache_shares(shares: Shares) -> None:
    """See to it that caches of single rows are where they can be.

    Raises:
        PolicyError: If a share of them belongs on disk.
    """
    if shares[2] > 0:
        raise PolicyError(
            f"The model runs in single rows, whose caches are transformers' own and live in memory, but {shares[2]:.0%} of the "
            "cache belongs on disk. Give cache shares of device and host only, such as (0, 1, 0)."
        )


def cache_bytes(cache: object) -> int:
    """Bytes of all tensors that a cache holds, however its layers keep them."""
    if isinstance(cache, Tensor):
        return cache.nbytes
    parts = cache if isinstance(cache, dict | list | tuple) else vars(cache) if hasattr(cache, "__dict__") else ()
    return sum(cache_bytes(part) for part in (parts.values() if isinstance(parts, dict) else parts))
