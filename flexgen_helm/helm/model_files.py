"""What HELM must know of a model before it is loaded, read from its small files without torch or transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flexgen_helm.context import CONTEXT_NAMES, DEFAULT_CONTEXT
from flexgen_helm.helm.deployment import GRAMMAR, DeploymentError

FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")


@dataclass(frozen=True)
class ModelLimits:
    """Context window and special tokens of a model."""

    context: int
    """Tokens that the model can attend to: special tokens, prompt and completion."""
    special_tokens: int
    """How many special tokens the tokenizer adds to a prompt. HELM counts prompts without them."""
    bos_token: str
    """Empty if there is none."""
    eos_token: str
    """Empty if there is none."""

    @property
    def window(self) -> int:
        """Tokens that HELM may fill with prompt and completion."""
        return self.context - self.special_tokens

    @property
    def prefix_token(self) -> str:
        """What language modelling puts before a document: the end token separates documents where there is no BOS token."""
        return self.bos_token or self.eos_token


@cache
def read_limits(name_or_path: str, revision: str | None = None) -> ModelLimits:
    """Read a local folder, or a hub model through the hub's own cache; once, because HELM asks at every request.

    Args:
        name_or_path: Path of a model folder, or hub name.
        revision: Branch, tag or commit on the hub.

    Raises:
        DeploymentError: The folder or hub model does not exist.
    """
    folder = _folder(name_or_path, revision)
    if not (folder / "config.json").exists():
        raise _missing(name_or_path, "there is no config.json")
    config = _read(folder / "config.json")
    tokenizer = _read(folder / "tokenizer_config.json")
    special = _read(folder / "special_tokens_map.json")
    return ModelLimits(
        context=_context(config),
        special_tokens=_num_special_tokens(tokenizer, folder / "tokenizer.json"),
        bos_token=_token(tokenizer.get("bos_token") or special.get("bos_token")),
        eos_token=_token(tokenizer.get("eos_token") or special.get("eos_token")),
    )


def _folder(name_or_path: str, revision: str | None) -> Path:
    """Return the folder with the model's small files, fetched from the hub where the name is not a folder's."""
    folder = Path(name_or_path)
    if folder.is_absolute() or folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:
        raise _missing(name_or_path, f"the hub says `{str(error).strip().splitlines()[0]}`") from error


def _read(path: Path) -> dict[str, Any]:
    """Return the parsed content of a file, nothing if there is no such file. A link to nowhere is no missing file."""
    if not path.is_symlink() and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeploymentError(f"`{path}` is not valid JSON ({error}). Download or save the model again.") from error
    if not isinstance(content, dict):
        raise DeploymentError(f"`{path}` holds no JSON object. Download or save the model again.")
    return content


def _missing(name_or_path: str, reason: str) -> DeploymentError:
    return DeploymentError(
        f"No model was found at `{name_or_path}`: {reason}. "
        f"Name a folder written by `save_pretrained` or a model on the hub: {GRAMMAR}."
    )


def _context(config: dict[str, Any]) -> int:
    text = config.get("text_config") or {}
    found = [section[name] for section in (text, config) for name in CONTEXT_NAMES if isinstance(section.get(name), int)]
    return min([int((found or [DEFAULT_CONTEXT])[0]), *_original_lengths(text), *_original_lengths(config)])


def _original_lengths(config: dict[str, Any]) -> list[int]:
    """Return the length up to which rotary embeddings stay the same, where they change with the longest sequence."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    sections = [rope, *(section for section in rope.values() if isinstance(section, dict))]
    kinds = {str(section.get("rope_type") or section.get("type")) for section in sections}
    if not any(kind == "longrope" or "dynamic" in kind for kind in kinds):
        return []
    lengths = [section.get("original_max_position_embeddings") for section in (*sections, config)]
    return [length for length in lengths if isinstance(length, int)]


def _num_special_tokens(tokenizer_config: dict[str, Any], tokenizer_file: Path) -> int:
    """Count special tokens; where files disagree the larger number, because one token too few costs nothing."""
    claimed = int(bool(tokenizer_config.get("add_bos_token")))
    if not tokenizer_file.is_symlink() and not tokenizer_file.is_file():
        # A sentencepiece tokenizer, whose classes add a BOS token unless told otherwise.
        return max(claimed, int(tokenizer_config.get("add_bos_token") is None and "bos_token" in tokenizer_config))
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise DeploymentError(f"`{tokenizer_file}` cannot be read ({error}). Download or save the model again.") from error
    return max(claimed, tokenizer.num_special_tokens_to_add(is_pair=False))


def _token(token: str | dict[str, Any] | None) -> str:
    if isinstance(token, dict):
        return str(token["content"])
    return token or ""
