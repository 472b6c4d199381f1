"""Reads what HELM must know of a model before its weights are loaded, from transformers' config, model and tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flexgen_helm.helm.deployment import GRAMMAR, DeploymentError
from flexgen_helm.loading.model_names import SMALL_FILES, fetch, local_path


@dataclass(frozen=True)
class ModelLimits:
    """Context window and special tokens of a model, as the engine has them."""

    context: int
    """Tokens that the model can attend to: special tokens, prompt and completion."""
    prefix: tuple[str, ...]
    """Special tokens that the tokenizer puts before a prompt. HELM counts prompts without them."""
    bos_token: str
    """Empty if there is none."""
    eos_token: str
    """Empty if there is none."""

    @property
    def window(self) -> int:
        """Tokens that HELM may fill with prompt and completion."""
        return self.context - len(self.prefix)

    @property
    def prefix_token(self) -> str:
        """Token that HELM puts before a document: the tokenizer's own token or, if it has none, BOS or the end token.

        HELM can leave out one token of the scores, not several. So it puts nothing there where the tokenizer has several;
        the engine puts them before the prompt.
        """
        return "" if len(self.prefix) > 1 else "".join(self.prefix) or self.bos_token or self.eos_token


@cache
def read_limits(name_or_path: str, revision: str | None = None) -> ModelLimits:
    """Ask config, model and tokenizer, as the engine loads them; once, because HELM asks at every request.

    Loads transformers and torch, but no weights.

    Args:
        name_or_path: Path of a model folder, or hub name.
        revision: Branch, tag or commit on the hub.

    Raises:
        DeploymentError: The folder or hub model does not exist.
        UnsupportedModel: The engine refuses the model.
        CorruptFile: A file is torn.
    """
    find_model(name_or_path, revision)
    from flexgen_helm.generation.prepare import added_prefix
    from flexgen_helm.loading.source import open_without_weights
    from flexgen_helm.model.context_length import context_of

    source = open_without_weights(name_or_path, revision=revision)
    context, _ = context_of(source.empty, source.config)
    tokenizer = source.tokenizer
    if tokenizer is None:
        return ModelLimits(context, (), "", "")
    return ModelLimits(
        context=context,
        prefix=tuple(tokenizer.convert_ids_to_tokens(list(added_prefix(tokenizer)))),
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
    )


def find_model(name_or_path: str, revision: str | None = None) -> None:
    """Check that a model exists, by its config.json alone. Loads neither transformers nor torch.

    Args:
        name_or_path: Path of a model folder, or hub name.
        revision: Branch, tag or commit on the hub.

    Raises:
        DeploymentError: The folder or hub model does not exist, or its config.json is torn.
    """
    path = _folder(name_or_path, revision) / "config.json"
    if not path.is_file():
        raise _missing(name_or_path, "there is no config.json")
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DeploymentError(f"`{path}` is not valid JSON ({error}). Download or save the model again.") from error


def _folder(name_or_path: str, revision: str | None) -> Path:
    """Return the folder with config.json, fetched from the hub where the name is not a folder's."""
    path = local_path(name_or_path)
    if path is not None:
        return path
    try:
        return fetch(name_or_path, revision, SMALL_FILES)
    except Exception as error:
        raise _missing(name_or_path, f"the hub says `{str(error).strip().splitlines()[0]}`") from error


def _missing(name_or_path: str, reason: str) -> DeploymentError:
    return DeploymentError(
        f"No model was found at `{name_or_path}`: {reason}. "
        f"Name a folder written by `save_pretrained` or a model on the hub: {GRAMMAR}."
    )
