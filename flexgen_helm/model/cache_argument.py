"""Where a model takes its cache, found by following one from the model to its layers.

Names of this argument differ between families and between versions of `transformers`, and annotations are missing or wrong in
some. So neither is read: with ``use_cache=True`` a model makes a cache itself and hands it on, and what it hands on is seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import Cache

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.model.recorder import LayerCall, Place, RecordedModel, Recording

Places = list[frozenset[Place]]
"""By layer, where it is given the cache."""


def cache_places(model: RecordedModel) -> Places:
    """Find where each layer is given the cache; nowhere in a model that makes none of transformers' classes."""
    return _places(_calls(model), lambda value: isinstance(value, Cache))


def cache_parameter(model: RecordedModel) -> str:
    """Find the parameter of the model's forward from which a cache arrives at the layers.

    It is the one that brings a given cache to the places where the model hands on the cache that it makes itself.

    Raises:
        UnsupportedModel: If there is none.
    """
    calls = _calls(model)
    made = next((value for call in calls for _, value in call.items() if isinstance(value, Cache)), None)
    if made is not None:
        places = _places(calls, lambda value: value is made)
        for name in _optional_parameters(model):
            with suppress(Exception):  # of the model's own code, which was given a cache where it takes something else
                if _places(_calls(model, **{name: made}), lambda value: value is made) == places:
                    return name
    raise UnsupportedModel("its forward takes no cache of transformers, so a prompt cannot be continued")


def _calls(model: RecordedModel, **given: Any) -> list[LayerCall]:
    """How the layers would be called for one token, by a model that uses a cache."""
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
    inputs = {"input_ids": ids, "position_ids": torch.zeros_like(ids), "use_cache": True}
    return model.record(Recording(), **{**inputs, **given}).calls


def _places(calls: Sequence[LayerCall], is_cache: Callable[[Any], bool]) -> Places:
    return [frozenset(place for place, value in call.items() if is_cache(value)) for call in calls]


def _optional_parameters(model: RecordedModel) -> list[str]:
    """Parameters of the model's forward that may be None, those whose annotation tells of a cache first.

    The annotation only saves attempts: with a wrong one, others are tried.
    """
    found = [p for p in inspect.signature(model.model.forward).parameters.values() if p.default is None]
    return [p.name for p in sorted(found, key=lambda p: "Cache" not in str(p.annotation))]
