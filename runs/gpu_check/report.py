"""What was found, as one JSON file and one page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexgen_helm.runs.gpu_check.parts import PARTS

HIDDEN = "measurement"
"""Key of results that is in the JSON file alone."""


def write_report(folder: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Write ``gpu_check.json`` and ``gpu_check.md``.

    Args:
        folder: Where to.
        found: By name of a part, what `run_part` returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("json", json.dumps(found, indent=2)), ("md", "\n".join(page(found)))):
        (folder / f"gpu_check.{name}").write_text(f"{text}\n", encoding="utf-8")


def page(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the page; parts that were not run yet are named."""
    yield "# First minutes on a GPU"
    for part in PARTS:
        yield f"\n## {part.question}"
        of_part = found.get(part.name)
        if of_part is None:
            yield "Not run yet."
            continue
        yield f"`{part.name}`, {of_part['seconds']:.0f} of at most {part.limit_s} s."
        if "error" in of_part:
            yield f"\n**{of_part['error']}**"
        else:
            yield from _result({name: value for name, value in of_part["result"].items() if name != HIDDEN})
        if not succeeded(of_part):
            yield from ("\n```", of_part["log"], "```")


def succeeded(of_part: Mapping[str, Any]) -> bool:
    """Return whether a part has a result, and the command behind it, if there is one, ended well."""
    return "error" not in of_part and not of_part["result"].get("status")


def _result(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield one table of plain values, one of dictionaries with equal keys, and one of each list."""
    plain = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
    yield from _table([{"": name, "value": value} for name, value in plain.items()])
    yield from _table([{"": name, **value} for name, value in result.items() if isinstance(value, dict)])
    for value in result.values():
        if isinstance(value, list):
            yield from _table(value)


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row))
        yield ""
        yield from (_line(cells) for cells in (names, ["---"] * len(names)))
        yield from (_line([_text(row.get(name, "")) for name in names]) for row in rows)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")
