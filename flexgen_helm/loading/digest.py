"""A digest of a model's weights and configuration: what makes two folders give the same answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from flexgen_helm.cache_folder import cache_folder
from flexgen_helm.loading.model_names import SMALL_FILES

FILES = ("*.safetensors", *SMALL_FILES, "additional_chat_templates/*.jinja")
"""What decides answers, by patterns of names in the folder."""


def model_digest(folder: Path) -> str:
    """Return 16 hexadecimal digits over the contents of a folder's weights, config and tokenizer files.

    Digests of files are memoised under the cache folder by real path, size and times; that of the last change of the inode
    betrays a file that was replaced by one of the same size and modification time.
    """
    memo = _Memo(cache_folder() / "digests.json")
    paths = sorted({path for pattern in FILES for path in folder.glob(pattern)})
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.relative_to(folder)}:{memo.digest(path)}\n".encode())
    memo.save()
    return total.hexdigest()[:16]


class _Memo:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._new: dict[str, str] = {}
        try:
            self._known: dict[str, str] = json.loads(file.read_text())
        except (OSError, ValueError):
            self._known = {}  # Only a memo: what it held is computed again.

    def digest(self, path: Path) -> str:
        real = path.resolve()
        status = real.stat()
        key = f"{real}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"
        if key not in self._known:
            with real.open("rb") as stream:
                self._known[key] = self._new[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._known[key]

    def save(self) -> None:
        if not self._new:
            return
        with contextlib.suppress(OSError):  # only a memo: on a full disk it is made again the next time
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False)  # noqa: SIM115
            try:
                with temporary:
                    json.dump(self._known, temporary, indent=1)
                os.replace(temporary.name, self._file)
            except OSError:
                os.unlink(temporary.name)
