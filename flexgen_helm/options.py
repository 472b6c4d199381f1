"""Texts of the command line that stand for a policy and for amounts of memory. No torch."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from flexgen_helm.errors import PolicyError
from flexgen_helm.types import Policy

POLICY_FORM = "Give JSON, or name=value pairs such as `gpu_batch_size=64,weights=0.2:0.8:0,overlap=false`."


def parse_policy(text: str) -> Policy:
    """Return the policy that a text names.

    Raises:
        PolicyError: If the text cannot be read, names a field that does not exist, or gives a field a value out of its range.
    """
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
    """Return amounts by tier, as in ``device=15GiB,host=100GiB``; what they mean is left to the engine.

    Raises:
        PolicyError: If the text has another form.
    """
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {tier.strip(): size.strip() for tier, size in pairs}
    except ValueError:
        raise PolicyError(f"max_memory is {text!r}. Give amounts by tier, such as `device=15GiB,host=100GiB`.") from None


def _pair(text: str) -> tuple[str, Any]:
    """Read ``name=value``; shares are separated by colons."""
    name, value = text.split("=")
    return name.strip(), [float(share) for share in value.split(":")] if ":" in value else json.loads(value)
