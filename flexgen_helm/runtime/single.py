"""Single rows: one sequence a row, with its own cache of the library's and the model's own attention.

For models that keep state beside attention, attend in their own way or take positions from elsewhere. Layers are still recorded
and replayed, so that each layer's weights are touched once for all rows of a block; nothing is shared between sequences.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import DynamicCache

from flexgen_helm.runtime.recorder import RecordedModel, Recording
from flexgen_helm.schedule.rows import Row, State, Sweep

CACHE_ARGUMENTS = ("past_key_values", "cache_params")
"""What forwards of the library call their cache."""


class SingleRows:
    """Computes rows of one sequence each."""

    def __init__(self, model: RecordedModel) -> None:
        """Leave the model as the library made it, but for the order in which its layers are called."""
        self.model = model
        model.use(model.own)

    @property
    def num_layers(self) -> int:
        """Layers that every row goes through."""
        return len(self.model.layers)

    def reserve(self, sweep: Sweep) -> None:
        """Nothing: caches grow as they are filled."""

    def record(self, row: Row) -> Recording:
        """Note how the layers would be called for a row; its cache is filled when they are."""
        (segment,) = row.segments
        assert segment.state is not None
        ids = torch.tensor([segment.tokens], device=self.model.device)
        cache = self._cache(segment.state)
        return self.model.record(
            Recording(),
            input_ids=ids,
            position_ids=torch.arange(segment.start, segment.end, device=ids.device)[None],
            attention_mask=ids.new_ones(1, segment.end),
            use_cache=True,
            **dict.fromkeys(CACHE_ARGUMENTS, cache),
        )

    def replay(self, j: int, recording: Recording) -> None:
        """Run layer j on a row."""
        self.model.replay(j, recording)

    def finish(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[P, hidden]`` of the last layer, of any rows, to logits ``[P, vocab]``."""
        return self.model.finish(hidden)

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
