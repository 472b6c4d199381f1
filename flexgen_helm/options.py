"""Parsers for the command line's texts of a policy and of amounts of memory. No torch."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from flexgen_helm.errors import PolicyError
from flexgen_helm.types import SLAB_CODINGS, Policy

POLICY_FORM = "Give auto, JSON, or name=value pairs such as `gpu_batch_size=64,weights=0.2:0.8:0,overlap=false`."


def parse_policy(text: str) -> Policy:
    """Return the policy for a text: "auto", JSON, or pairs such as ``gpu_batch_size=64,weights=0.2:0.8:0``.

    Raises:
        PolicyError: If the text cannot be read, names an unknown field, or gives a field a value out of its range.
    """
    if text.strip() == "auto":
        return Policy(auto=True)
    try:
        fields = json.loads(text) if text.lstrip().startswith("{") else dict(_pair(part) for part in text.split(","))
    except ValueError:
        raise PolicyError(f"The policy {text!r} cannot be read. {POLICY_FORM}") from None
    known = [field.name for field in dataclasses.fields(Policy)]
    for name in fields:
        if name not in known:
            raise PolicyError(f"A policy has no {name!r}. Its fields are {', '.join(known)}.")
    return Policy(**fields)


def parse_max_memory(text: str) -> dict[str, str]:
    """Return amounts by tier for a text such as ``device=15GiB,host=100GiB``; the engine parses the amounts.

    Raises:
        PolicyError: If the text has another form.
    """
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {tier.strip(): size.strip() for tier, size in pairs}
    except ValueError:
        raise PolicyError(f"max_memory is {text!r}. Give amounts by tier, such as `device=15GiB,host=100GiB`.") from None


def _pair(text: str) -> tuple[str, Any]:
    """Read ``name=value``; shares are separated by colons, and the words of `SLAB_CODINGS` need no quotes."""
    name, value = (part.strip() for part in text.split("="))
    if value in SLAB_CODINGS:
        return name, value
    return name, [float(share) for share in value.split(":")] if ":" in value else json.loads(value)
