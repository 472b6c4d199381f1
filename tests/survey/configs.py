"""Tiny configurations of any model type, made from the type's own defaults.

The rule is generic: a field that is known by name gets a small value wherever a configuration has it, lists with one entry
per layer are shortened to four entries that hold every kind, and special tokens move to the beginning of the vocabulary.
What this cannot know about a type stands in `tests.survey.sizes.OVERRIDES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.survey.sizes import FILLED, HEADS, INDEX_LISTS, LAYERS, OVERRIDES, SIZES, SPECIAL_TOKENS, TOWER_LAYERS

Fields = dict[str, Any]


def tiny_config(kind: str, changes: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Returns the tiny configuration of a type.

    Args:
        kind: A key of the library's causal-LM mapping.
        changes: Fields that differ; those of a sub-configuration in a dictionary under its name. None is a value.
    """
    config_class: Callable[..., PreTrainedConfig] = CONFIG_MAPPING[kind]
    fields = merged(small_fields(CONFIG_MAPPING[kind]()), OVERRIDES.get(kind, {}))
    return config_class(**merged(fields, changes or {}))


def merged(fields: Fields, changes: Mapping[str, Any]) -> Fields:
    """Returns fields with changes; a sub-configuration that both have is merged in turn."""
    result = dict(fields)
    for name, value in changes.items():
        both = name.endswith("_config") and isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if both else value
    return result


def small_fields(default: PreTrainedConfig) -> Fields:
    """Returns the constructor arguments that make a configuration like ``default`` small."""
    # Not by attribute: one that differs from layer to layer cannot be read so.
    values = {field.name: vars(default).get(field.name, field.default) for field in dataclasses.fields(default) if field.init}
    depth = getattr(default, "num_hidden_layers", None)
    fields, strides = Fields(), iter((1, 2, 1, 2))
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = merged(small_fields(value), OVERRIDES.get(value.model_type, {}))
            if name.startswith(("vision", "audio")):
                fields[name].update((depth, TOWER_LAYERS) for depth in ("num_hidden_layers", "depth") if depth in fields[name])
        elif name in INDEX_LISTS:
            fields[name] = INDEX_LISTS[name]
        elif isinstance(value, list | tuple) and value and len(value) == depth:
            kinds = [kind for number, kind in enumerate(value) if kind not in value[:number]]
            fields[name] = _every_kind(kinds, next(strides) if len(kinds) == 2 else 1)
        elif name.endswith(("token_id", "token_index")) and value is not None:
            fields[name] = SPECIAL_TOKENS.get(name, 3)
        elif name == "is_decoder":
            fields[name] = not default.is_encoder_decoder
        elif name in SIZES and (value is not None or name in FILLED):
            fields[name] = SIZES[name]
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = HEADS
    return fields


def _every_kind(kinds: list[Any], repeats: int) -> list[Any]:
    """One entry for each of the layers, so that every kind is there.

    The first list of a configuration alternates and the second repeats each kind twice, so that they meet in every combination.
    """
    return [kinds[number // repeats % len(kinds)] for number in range(LAYERS)]
