"""Single rows: one sequence in a row, with transformers' own cache and the model's own attention.

They serve models that keep state other than K and V, attend in their own way or take positions from elsewhere. Layers are
still recorded and replayed, so each layer's weights are loaded once for all rows of a block. Sequences share nothing.
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
from flexgen_helm.kv_cache.cache_format import CacheFormat
from flexgen_helm.kv_cache.state_store import OwnedState, StateStore
from flexgen_helm.memory.copies import upload
from flexgen_helm.memory.link import Transfer
from flexgen_helm.model.cache_argument import cache_parameter
from flexgen_helm.model.recorder import RecordedModel, Recording
from flexgen_helm.rows.lockstep import run_in_lockstep
from flexgen_helm.schedule.rows import Row, Segment, State, Sweep
from flexgen_helm.types import Shares


@dataclass(kw_only=True)
class SingleRecording(Recording):
    """A recorded row that holds one sequence."""

    state: State
    """Cache of the sequence."""
    arriving: dict[int, Transfer | None] = field(default_factory=dict)
    """Transfer that brings the cache of each layer, by layer number; None if nothing is moved."""


@dataclass
class JointRecording:
    """A recorded decode row: one recording of one token for each of several sequences."""

    hidden_moves: ClassVar[bool] = False
    """Whether hidden states are stored on other tiers between two layers: never, each part keeps its own, which is small."""
    parts: list[SingleRecording]
    """Recordings, one for each sequence."""
    size: int
    """Tokens that are multiplied with the weights at once; the last slice is padded to it."""
    arriving: dict[int, Transfer | None] = field(default_factory=dict)
    """Transfer that brings the caches of each layer, by layer number; None if nothing is moved."""
    hidden: Tensor | None = None
    """Always None: the parts keep the hidden states."""

    @property
    def tokens(self) -> Tensor:
        """Hidden states of all sequences: ``[sequences, ...]``."""
        return torch.cat([part.tokens for part in self.parts])


class SingleRows:
    """Computes single rows: one sequence in a prefill row, and sequences that decode in lockstep."""

    def __init__(self, model: RecordedModel, store: StateStore | None = None) -> None:
        """Make the model use its own attention.

        Args:
            model: The model.
            store: Store that moves caches between device and host; None if all caches stay on the device.

        Raises:
            UnsupportedModel: If the model's forward takes no cache.
        """
        self.model, self._store = model, store
        model.use(model.own)
        self._cache_parameter = cache_parameter(model)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.model.layers)

    @property
    def can_be_halved(self) -> bool:
        """Whether a sweep may be repeated in smaller rows: never, because the caches have grown already."""
        return False

    def reserve(self, sweep: Sweep) -> None:
        """Wait for the last sweep's transfers, because caches that begin as copies need them. Caches grow when filled."""
        if self._store is not None:
            self._store.settle()

    def record(self, row: Row) -> SingleRecording | JointRecording:
        """Record how each layer is called for a row, without computing layers; the cache is filled at replay."""
        parts = [self._record(segment) for segment in row.segments]
        return JointRecording(parts, row.size) if row.kind == "decode" else parts[0]

    def load_cache(self, j: int, recording: SingleRecording | JointRecording) -> Transfer | None:
        """Start to bring the caches of layer j of a row's sequences to the device; the layer waits for them."""
        if self._store is None:
            return None
        if j not in recording.arriving:
            recording.arriving[j] = self._store.load(j, _states(j, recording))
        return recording.arriving[j]

    def store_cache(self, j: int, recording: SingleRecording | JointRecording) -> Transfer | None:
        """Start to bring the caches of layer j back to where they are stored; must follow every replay."""
        return None if self._store is None else self._store.store(j, _states(j, recording))

    def replay(self, j: int, recording: SingleRecording | JointRecording) -> None:
        """Run layer j on a row."""
        arriving = self.load_cache(j, recording)
        if arriving is not None and self._store is not None:
            self._store.wait(arriving)
        if isinstance(recording, Recording):
            self.model.replay(j, recording)
            return
        calls = [partial(self.model.replay, j, part) for part in recording.parts]
        run_in_lockstep(self.model.layers[j], calls, size=recording.size)

    def use_suspender(self, suspend: Callable[[], None]) -> None:
        """Ignore it: the model's own attention never waits for the CPU."""

    def bad_tokens(self, recording: SingleRecording | JointRecording) -> None:
        """Return None: a sequence's cache is its own, so NaN or infinity in it shows in its logits, as in transformers."""

    def close(self) -> None:
        """Stop moving caches."""
        if self._store is not None:
            self._store.close()

    def finish(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[P, vocab]`` for hidden states ``[P, ...]`` of the last layer, of any rows."""
        return self.model.finish(hidden)

    def _record(self, segment: Segment) -> SingleRecording:
        assert segment.state is not None
        ids = upload([segment.tokens], self.model.device)
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
    """Return the cache of layer j of each sequence of a row."""
    states = [part.state for part in (recording.parts if isinstance(recording, JointRecording) else [recording])]
    caches = [(state, state.content) for state in states]
    return [
        OwnedState(state, cache.layers[j])
        for state, cache in caches
        if isinstance(cache, DynamicCache) and j < len(cache.layers)
    ]


def require_plain_cache(cache_format: CacheFormat) -> None:
    """Check that nothing of the caches of single rows is to be quantised.

    Raises:
        PolicyError: If it is.
    """
    if not cache_format.is_plain:
        raise PolicyError(
            "The model runs in single rows, whose caches are transformers' own, so that K and V cannot be compressed. Name a "
            "variant of its weights alone, such as @w4."
        )


def check_cache_shares(shares: Shares) -> None:
    """Check that a policy puts no caches of single rows on disk.

    Args:
        shares: Shares of the cache on device, host and disk.

    Raises:
        PolicyError: If the share on disk is more than 0.
    """
    if shares[2] > 0:
        raise PolicyError(
            f"The model runs in single rows, whose caches are transformers' own and live in memory, but {shares[2]:.0%} of the "
            "cache belongs on disk. Give cache shares of device and host only, such as (0, 1, 0)."
        )


def cache_bytes(cache: object) -> int:
    """Return the bytes of all tensors that a cache holds, in attributes, lists or dictionaries of any depth."""
    if isinstance(cache, Tensor):
        return cache.nbytes
    parts = cache if isinstance(cache, dict | list | tuple) else vars(cache) if hasattr(cache, "__dict__") else ()
    return sum(cache_bytes(part) for part in (parts.values() if isinstance(parts, dict) else parts))
