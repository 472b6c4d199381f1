"""The options of an engine that an evaluation takes, from the command line or from Python, as plain data for YAML. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypedDict

from flexgen_helm.errors import FlexGenError
from flexgen_helm.machine.profile_file import named_profile, profile_names
from flexgen_helm.options import parse_max_memory, parse_policy
from flexgen_helm.types import Policy

KV_DTYPES = ("float32", "bfloat16", "float16")
DTYPES = ("auto", *KV_DTYPES)
ROWS = ("auto", "packed", "single")


class EngineChoices(TypedDict, total=False):
    """Keywords of ``Engine.from_pretrained`` that may be chosen for an evaluation; one that is left out has its default."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: str
    rows: Literal["auto", "packed", "single"]
    policy: Policy | Mapping[str, Any] | str
    profile: str | PathLike[str]
    max_memory: Mapping[str, int | str] | str
    offload_folder: str | PathLike[str]
    kv_dtype: Literal["float32", "bfloat16", "float16"]
    recheck: bool
    compile_layers: bool


CHOICES = tuple(EngineChoices.__annotations__)
WORDS = {"dtype": DTYPES, "rows": ROWS, "kv_dtype": KV_DTYPES}


def parse_profile(text: str) -> str:
    """Return the name of a machine's profile, or the absolute path of its file, both of which are known to be good.

    Raises:
        FlexGenError: If there is no such profile, or it cannot be read.
    """
    named_profile(text)
    return text if text in profile_names() else str(Path(text).absolute())


def plain_choices(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what differs from the defaults, as YAML can hold it.

    Args:
        given: See `EngineChoices`; None stands for the default.

    Raises:
        FlexGenError: If there is no such option or value.
    """
    for name in given:
        _check_name(name)
    chosen = {name: value for name, value in given.items() if value not in (None, "auto", False)}
    for name, words in WORDS.items():
        if chosen.get(name, words[0]) not in words:
            raise FlexGenError(f"{name} is {chosen[name]!r}. Give one of {', '.join(words)}, or leave it out.")
    if "policy" in chosen:
        chosen["policy"] = _plain_policy(chosen["policy"])
    if "max_memory" in chosen:
        limits = chosen["max_memory"]
        chosen["max_memory"] = parse_max_memory(limits) if isinstance(limits, str) else dict(limits)
    if "profile" in chosen:
        chosen["profile"] = parse_profile(str(chosen["profile"]))
    if "offload_folder" in chosen:
        chosen["offload_folder"] = str(Path(chosen["offload_folder"]).expanduser().absolute())
    return chosen


def _check_name(name: str) -> None:
    if name in CHOICES:
        return
    similar = difflib.get_close_matches(name, CHOICES, n=1)
    hint = f" Did you mean `{similar[0]}`?" if similar else ""
    raise FlexGenError(f"An evaluation has no option `{name}`.{hint} Options of its engine are {', '.join(CHOICES)}.")


def _plain_policy(asked: Policy | Mapping[str, Any] | str) -> dict[str, Any]:
    """Return the fields of a policy that differ from their defaults."""
    if isinstance(asked, str):
        asked = parse_policy(asked)
    fields, plain = vars(asked) if isinstance(asked, Policy) else asked, vars(Policy())
    named = {name: value for name, value in fields.items() if name not in plain or value != plain[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in named.items()}
