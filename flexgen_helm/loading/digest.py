"""Compute a digest of a model's weights, config and tokenizer: models with equal digests give equal answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from flexgen_helm.cache_folder import cache_folder, write_whole
from flexgen_helm.errors import CorruptFile
from flexgen_helm.loading.model_names import SMALL_FILES

FILES = ("*.safetensors", *SMALL_FILES, "additional_chat_templates/*.jinja")
"""Patterns of the names of all files in a model folder that determine answers."""


def model_digest(folder: Path) -> str:
    """Return a digest (16 hexadecimal digits) of names and contents of a folder's weights, config and tokenizer files.

    Digests of single files are remembered in the cache folder, by real path, size, inode and times. The time of the inode's
    last change reveals a file that was replaced by another of equal size and modification time.

    Args:
        folder: The model folder with its weights.

    Raises:
        CorruptFile: If a file cannot be read.
    """
    memo = _Memo(cache_folder() / "digests.json")
    paths = sorted({path for pattern in FILES for path in folder.glob(pattern)})
    total = hashlib.sha256()
    for path in paths:
        try:
            total.update(f"{path.relative_to(folder)}:{memo.digest(path)}\n".encode())
        except OSError as error:
            raise CorruptFile(f"{path} cannot be read ({error.strerror}). Fetch that file again.") from error
    memo.save()
    return total.hexdigest()[:16]


class _Memo:
    """Digests of files that were computed before, in a JSON file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._new: dict[str, str] = {}
        try:
            self._known: dict[str, str] = json.loads(file.read_text())
        except (OSError, ValueError):
            self._known = {}  # Only a memo: the digests are computed again.

    def digest(self, path: Path) -> str:
        """Return the SHA-256 of a file in hexadecimal digits, computed only if the file is new or changed."""
        real = path.resolve()
        status = real.stat()
        key = f"{real}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"
        if key not in self._known:
            with real.open("rb") as stream:
                self._known[key] = self._new[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._known[key]

    def save(self) -> None:
        """Write the memo if it has new digests, without files that are gone. An error of writing is ignored."""
        if not self._new:
            return
        kept = {key: digest for key, digest in self._known.items() if Path(key.rsplit(":", 4)[0]).exists()}
        with contextlib.suppress(OSError):  # only a memo: if the disk is full, the digests are computed again the next time
            write_whole(self._file, json.dumps(kept, indent=1))
