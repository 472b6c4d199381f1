"""Which names mean folders on this machine and which models on the hub, and what is fetched of the latter.

The module imports neither torch nor transformers, because HELM's plugin needs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

SMALL_FILES = (
    *("*.json", "*.txt", "*.model", "tokenizer.model.*", "*.tiktoken", "*.codes", "*.spm", "*.tokenizer"),
    "*.jinja",
)
"""Configs, chat templates, and the vocabularies of transformers' tokenizers."""


def local_path(name: str) -> Path | None:
    """Return the path that a name means, whether it exists or not; None for the name of a hub model."""
    path = Path(name).expanduser()
    written_as_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix == ".gguf"
    return path if written_as_path or path.exists() else None


def fetch(name: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """Return the folder with files of a hub model, of which those that are not on this machine yet are fetched.

    Args:
        name: Name of the model on the hub.
        revision: Branch, tag or commit; None for the newest.
        patterns: Names of the files, with wildcards.

    Raises:
        Exception: Whatever the hub's own client raises.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=sorted(patterns)))
