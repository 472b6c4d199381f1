"""Profiles as JSON files: those that are measured, those that users write by hand, and those that ship with the package.

A file has the fields of `flexgen_helm.machine.profile.MachineProfile`. Fields that have a default may be left out, and a rate
may be a number alone. No torch.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from flexgen_helm.cache_folder import write_whole
from flexgen_helm.errors import FlexGenError
from flexgen_helm.machine.profile import MachineProfile, Rate

SHIPPED = resources.files("flexgen_helm.machine") / "profiles"
"""Folder of the profiles that ship with the package."""
POSITIVE = ("value", "tokens", "threads", "duplex", "seconds")
"""Fields that are divided by, or count something that must be there."""
HELP = "docs/planning.md describes the fields."


def to_json(profile: MachineProfile) -> str:
    """Return a profile as JSON."""
    return json.dumps(asdict(profile), indent=1)


def from_json(text: str, name: str = "profile") -> MachineProfile:
    """Read a profile.

    Args:
        text: JSON.
        name: Name of the text, for messages.

    Raises:
        FlexGenError: If it is no JSON, or a field is unknown, missing, or has a value that it cannot have.
    """
    try:
        found = json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise FlexGenError(f"{name} cannot be read as JSON ({error}). Correct it; {HELP}") from None
    try:
        profile: MachineProfile = _read(found, MachineProfile, "")
    except _WrongField as error:
        raise FlexGenError(f"{name}: {error} {HELP}") from None
    return profile


def write_profile(profile: MachineProfile, file: Path) -> None:
    """Write a profile.

    Raises:
        FlexGenError: If the file cannot be written.
    """
    try:
        write_whole(file, to_json(profile) + "\n")
    except OSError as error:
        raise FlexGenError(f"The profile cannot be written to {file} ({error}). Give another file.") from None


def read_profile(file: Path) -> MachineProfile:
    """Read the profile in a file.

    Raises:
        FlexGenError: If it cannot be read, or holds no profile; see `from_json`.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FlexGenError(f"The profile {file} cannot be read ({error}). Correct the path, or the file.") from None
    return from_json(text, f"profile {file}")


def profile_names() -> list[str]:
    """Return the names of the profiles that ship with the package."""
    return sorted(file.name.removesuffix(".json") for file in SHIPPED.iterdir() if file.name.endswith(".json"))


def named_profile(name_or_file: str | Path) -> MachineProfile:
    """Return the profile of a name, or of a file.

    Args:
        name_or_file: A name that ships with the package comes first.

    Raises:
        FlexGenError: If there is neither; the message lists the names.
    """
    name = str(name_or_file)
    if name in profile_names():
        return from_json((SHIPPED / f"{name}.json").read_text(encoding="utf-8"), f"profile {name}")
    if not Path(name).exists():
        raise FlexGenError(
            f"There is no profile {name!r}, neither by this name nor as a file. Give one of {', '.join(profile_names())}, or a "
            "file that `flexgen-helm profile --out FILE` wrote."
        )
    return read_profile(Path(name))


class _WrongField(Exception):
    """Says what is wrong with a field."""


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _read(value: Any, wanted: Any, place: str) -> Any:
    """Return a JSON value as a type.

    Args:
        value: The value.
        wanted: A dataclass, a mapping, a tuple of equal members, a `Literal`, a union with None, or a plain type.
        place: Where it stands, for messages.
    """
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(value, arguments[0], place)
    if origin is tuple:
        if not isinstance(value, list):
            _refuse(value, place, "a list")
        return tuple(_read(one, arguments[0], f"{place}[{i}]") for i, one in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            _refuse(value, place, f"one of {', '.join(map(json.dumps, arguments))}")
        return value
    if origin is not None:
        return _read_mapping(value, arguments, place)
    if isinstance(wanted, type) and is_dataclass(wanted):
        return _read_fields(value, wanted, place)
    return _PLAIN[wanted](value, place)


def _read_mapping(value: Any, arguments: tuple[Any, Any], place: str) -> dict[Any, Any]:
    """Return a mapping from tiers or kinds of rows; every tier must be there."""
    names = get_args(arguments[0])
    if not isinstance(value, dict):
        _refuse(value, place, f"an object with {', '.join(names)}")
    unknown = [name for name in value if name not in names]
    if unknown:
        raise _WrongField(f"{place} has no {unknown[0]!r}. It has {', '.join(names)}.")
    missing = [name for name in names if name not in value]
    if missing and place == "memory":
        raise _WrongField(f"{place}.{missing[0]} is missing. Add it: bytes of the tier, 0 if there are none.")
    return {name: _read(one, arguments[1], f"{place}.{name}") for name, one in value.items()}


def _read_fields(value: Any, wanted: type, place: str) -> Any:
    """Return a dataclass."""
    if wanted is Rate and isinstance(value, int | float) and not isinstance(value, bool):
        value = {"value": value}
    if not isinstance(value, dict):
        _refuse(value, place or "all of it", "a rate" if wanted is Rate else "an object")
    inside = f"{place}." if place else ""
    known = {field.name: field for field in fields(wanted)}
    for name in value:
        if name not in known:
            raise _WrongField(f"{inside}{name} is no field. Those are {', '.join(known)}. Correct it, or leave it out.")
    for name, field in known.items():
        if name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise _WrongField(f"{inside}{name} is missing. Add it.")
    hints = get_type_hints(wanted)
    return wanted(**{name: _read(one, hints[name], f"{inside}{name}") for name, one in value.items()})


def _number(value: Any, place: str) -> float:
    name = place.rpartition(".")[2]
    wanted = "a number of more than 0" if name in POSITIVE else "a number of 0 or more"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _refuse(value, place, wanted)
    if value < 0 or (value == 0 and name in POSITIVE):
        _refuse(value, place, wanted)
    return float(value)


def _integer(value: Any, place: str) -> int:
    if _number(value, place) != int(value):
        _refuse(value, place, "a whole number")
    return int(value)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        _refuse(value, place, "a text")
    return str(value)


def _truth(value: Any, place: str) -> bool:
    if not isinstance(value, bool):
        _refuse(value, place, "true or false")
    return bool(value)


_PLAIN: Mapping[Any, Callable[[Any, str], Any]] = {float: _number, int: _integer, str: _text, bool: _truth}


def _refuse(value: Any, place: str, wanted: str) -> NoReturn:
    shown = json.dumps(value)
    raise _WrongField(f"{place} is {shown if len(shown) <= 40 else shown[:37] + '...'}, but must be {wanted}. Correct it.")
