"""Find the argument by which a model, and each of its layers, takes the K/V cache.

The name of this argument differs between model types and between versions of transformers, and its annotation is missing or
wrong in some. So it is found by observation: with ``use_cache=True`` a model makes a cache and passes it to its layers, and the
recorded layer calls show where.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import Cache

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.model.recorder import ArgumentKey, LayerCall, RecordedModel, Recording

Places = list[frozenset[ArgumentKey]]
"""For each layer, the arguments that are the cache."""


def cache_places(model: RecordedModel) -> Places:
    """Find the arguments of each layer that are the cache. They are empty if the model makes no `transformers.Cache`."""
    return _places(_calls(model), lambda value: isinstance(value, Cache))


def cache_parameter(model: RecordedModel) -> str:
    """Find the parameter of the model's forward that takes a cache.

    A cache passed by it reaches the layers at the same arguments as a cache that the model makes itself.

    Raises:
        UnsupportedModel: If no parameter does so.
    """
    calls = _calls(model)
    made = next((value for call in calls for _, value in call.items() if isinstance(value, Cache)), None)
    if made is not None:
        places = _places(calls, lambda value: value is made)
        for name in _optional_parameters(model):
            with suppress(Exception):  # raised by the model's code where the parameter takes something else
                if _places(_calls(model, **{name: made}), lambda value: value is made) == places:
                    return name
    raise UnsupportedModel("its forward takes no cache of transformers, so a prompt cannot be continued")


def _calls(model: RecordedModel, **given: Any) -> list[LayerCall]:
    """Return how the model calls its layers for one token with ``use_cache=True``."""
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
    inputs = {"input_ids": ids, "position_ids": torch.zeros_like(ids), "use_cache": True}
    return model.record(Recording(), **{**inputs, **given}).calls


def _places(calls: Sequence[LayerCall], is_cache: Callable[[Any], bool]) -> Places:
    return [frozenset(place for place, value in call.items() if is_cache(value)) for call in calls]


def _optional_parameters(model: RecordedModel) -> list[str]:
    """Return the parameters of the model's forward whose default is None, those annotated as a cache first.

    The order only saves attempts: if an annotation is wrong, the other parameters are tried too.
    """
    found = [p for p in inspect.signature(model.model.forward).parameters.values() if p.default is None]
    return [p.name for p in sorted(found, key=lambda p: "Cache" not in str(p.annotation))]
