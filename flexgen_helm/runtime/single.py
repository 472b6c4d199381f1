"""Single rows: one sequence a row, with its own cache of the library's and the model's own attention.

For models that keep state beside attention, attend in their own way or take positions from elsewhere. Layers are still recorded
and replayed, so that each layer's weights are touched once for all rows of a block; nothing is shared between sequences.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from flexgen_helm.runtime.lockstep import run_in_lockstep
from flexgen_helm.runtime.recorder import RecordedModel, Recording
from flexgen_helm.schedule.rows import Row, Segment, State, Sweep

CACHE_PARAMETERS = ("past_key_values", "cache_params")
"""What forwards of the library call their cache."""


@dataclass
class JointRecording:
    """Decoding sequences side by side: a recording for each, of one token."""

    parts: list[Recording]
    size: int
    """Tokens with which the weights meet; what is missing is padding."""

    @property
    def tokens(self) -> Tensor:
        """Their hidden states: ``[sequences, ...]``."""
        return torch.cat([part.tokens for part in self.parts])


class SingleRows:
    """Computes rows of one sequence each. Sequences that decode are computed side by side."""

    def __init__(self, model: RecordedModel) -> None:
        """Leave the model as the library made it, but for the order in which its layers are called."""
        self.model = model
        model.use(model.own)

    @property
    def num_layers(self) -> int:
        """Layers that every row goes through."""
        return len(self.model.layers)

    @property
    def can_be_halved(self) -> bool:
        """Caches have grown already."""
        return False

    def reserve(self, sweep: Sweep) -> None:
        """Nothing: caches grow as they are filled."""

    def record(self, row: Row) -> Recording | JointRecording:
        """Note how the layers would be called for a row; caches are filled when they are."""
        parts = [self._record(segment) for segment in row.segments]
        return JointRecording(parts, row.size) if row.kind == "decode" else parts[0]

    def load_cache(self, j: int, recording: Recording | JointRecording) -> None:
        """Nothing: the cache stays on the device."""

    def store_cache(self, j: int, recording: Recording | JointRecording) -> None:
        """Nothing: the cache stays on the device."""

    def replay(self, j: int, recording: Recording | JointRecording) -> None:
        """Run layer j on a row."""
        if isinstance(recording, Recording):
            self.model.replay(j, recording)
            return
        calls = [partial(self.model.replay, j, part) for part in recording.parts]
        run_in_lockstep(self.model.layers[j], calls, size=recording.size)

    def finish(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[P, ...]`` of the last layer, of any rows, to logits ``[P, vocab]``."""
        return self.model.finish(hidden)

    def _record(self, segment: Segment) -> Recording:
        assert segment.state is not None
        ids = torch.tensor([segment.tokens], device=self.model.device)
        cache = self._cache(segment.state)
        return self.model.record(
            Recording(),
            input_ids=ids,
            position_ids=torch.arange(segment.start, segment.end, device=ids.device)[None],
            use_cache=True,
            **dict.fromkeys(CACHE_PARAMETERS, cache),
        )

    def _cache(self, state: State) -> DynamicCache:
        if state.content is None:
            origin = state.origin.content if state.origin is not None else None
            config = self.model.model.config.get_text_config(decoder=True)
            state.content = copy.deepcopy(origin) if origin is not None else DynamicCache(config=config)
            state.origin = None
        assert isinstance(state.content, DynamicCache)
        return state.content


def cache_bytes(cache: object) -> int:
    """Bytes of all tensors that a cache holds, however its layers keep them."""
    if isinstance(cache, Tensor):
        return cache.nbytes
    parts = cache if isinstance(cache, dict | list | tuple) else vars(cache) if hasattr(cache, "__dict__") else ()
    return sum(cache_bytes(part) for part in (parts.values() if isinstance(parts, dict) else parts))
