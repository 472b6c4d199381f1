"""Damage to one file: truncated, bytes flipped, emptied, replaced by a folder, or by a file of another version."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import sqlite3
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

OTHER_VALUES: tuple[Any, ...] = (None, 0, -1, 1e300, "", "other", [], {}, True, [[]])


def truncate(path: Path, generator: random.Random) -> None:
    """Cut a file anywhere."""
    content = path.read_bytes()
    path.write_bytes(content[: generator.randrange(max(1, len(content)))])


def flip(path: Path, generator: random.Random) -> None:
    """Change one to eight bytes."""
    content = bytearray(path.read_bytes())
    for _ in range(generator.randint(1, 8)):
        content[generator.randrange(len(content))] ^= generator.randint(1, 255)
    path.write_bytes(content)


def empty(path: Path, generator: random.Random) -> None:
    """Leave nothing of the content."""
    path.write_bytes(b"")


def to_folder(path: Path, generator: random.Random) -> None:
    """Put a folder in the place of the file."""
    path.unlink()
    path.mkdir()


def other_version(path: Path, generator: random.Random) -> None:
    """Write a whole file of the same kind in which something is called or typed otherwise."""
    change = _OF_KINDS.get(path.suffix, _other_bytes)
    change(path, generator)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": truncate,
    "flipped": flip,
    "emptied": empty,
    "a folder": to_folder,
    "another version": other_version,
}


def remove(path: Path) -> None:
    """Remove a file, or the folder in its place."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _other_bytes(path: Path, generator: random.Random) -> None:
    path.write_bytes(generator.randbytes(path.stat().st_size))


def _other_json(path: Path, generator: random.Random) -> None:
    content = _changed(json.loads(path.read_text(encoding="utf-8")), generator)
    path.write_text(json.dumps(content), encoding="utf-8")


def _changed(content: Any, generator: random.Random) -> Any:
    """Return parsed JSON with one change at a random place."""
    if isinstance(content, dict) and content:
        key = generator.choice(list(content))
        match generator.randrange(6):
            case 0:
                return {name: value for name, value in content.items() if name != key}
            case 1:
                return {**content, key: _of_another_type(content[key], generator)}
            case 2:
                return {**content, "added_by_another_version": 1}
            case _:
                return {**content, key: _changed(content[key], generator)}
    if isinstance(content, list) and content:
        at = generator.randrange(len(content))
        return [*content[:at], _changed(content[at], generator), *content[at + 1 :]]
    return _of_another_type(content, generator)


def _of_another_type(value: Any, generator: random.Random) -> Any:
    kind = (int, float) if isinstance(value, int | float) else type(value)
    return generator.choice([each for each in OTHER_VALUES if not isinstance(each, kind)])


def _other_journal(path: Path, generator: random.Random) -> None:
    """Change a record, whose checksum is right."""
    lines = path.read_bytes().splitlines()
    at = generator.randrange(len(lines))
    record = json.dumps(_changed(json.loads(lines[at].partition(b" ")[2]), generator)).encode()
    lines[at] = b"%08x %s" % (zlib.crc32(record), record)
    path.write_bytes(b"\n".join(lines) + b"\n")


def _other_tensors(path: Path, generator: random.Random) -> None:
    """Rename a tensor, or change what its header says of it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(_changed(json.loads(content[8 : 8 + length]), generator)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def _other_database(path: Path, generator: random.Random) -> None:
    """Change what the rows hold, or the table."""
    with sqlite3.connect(path) as connection:
        match generator.randrange(3):
            case 0:
                connection.execute('ALTER TABLE "unnamed" RENAME COLUMN value TO other')
            case 1:
                connection.execute('UPDATE "unnamed" SET value = ?', (pickle.dumps({"text": "other"}),))
            case _:
                value = generator.choice((None, 5, "text", b"", pickle.dumps([1])))
                connection.execute('UPDATE "unnamed" SET value = ?', (value,))
    connection.close()


_OF_KINDS = {".json": _other_json, ".jsonl": _other_journal, ".safetensors": _other_tensors, ".sqlite": _other_database}
