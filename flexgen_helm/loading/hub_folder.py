"""Find or download the folder of a model: config and tokenizer first, so that no weights of a refused model are downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flexgen_helm.errors import FlexGenError
from flexgen_helm.loading.checkpoint import INDEX_FILE, SINGLE_FILE, read_index
from flexgen_helm.loading.model_names import SMALL_FILES, fetch, local_path
from flexgen_helm.loading.refusals import refuse_file


def folder_without_weights(name: str, revision: str | None) -> Path:
    """Return the folder of a model with its config and tokenizer. A hub model is downloaded without its weights.

    Args:
        name: A folder, or a name on the model hub.
        revision: Branch, tag or commit of a hub model. None means its main branch.

    Raises:
        FlexGenError: If there is no such folder or hub model, or the path is a file.
        UnsupportedModel: If the path is a GGUF file.
    """
    path = local_path(name)
    if path is None:
        return _fetched(name, revision, SMALL_FILES)
    if path.is_dir():
        return path
    if path.is_file() or path.suffix == ".gguf":
        refuse_file(path)
    raise FlexGenError(f"There is no folder {path}. Give an existing model folder, or a hub name such as 'org/model'.")


def folder_with_weights(name: str, revision: str | None, folder: Path) -> Path:
    """Return the folder of a model with its weights. Of a hub model, only the safetensors files of the model are downloaded.

    Args:
        name: A folder, or a name on the model hub.
        revision: Branch, tag or commit of a hub model. None means its main branch.
        folder: The folder that `folder_without_weights` returned.

    Raises:
        FlexGenError: If the weights cannot be downloaded.
        CorruptFile: If the index of the weights is torn.
    """
    if local_path(name) is not None:
        return folder
    index = read_index(folder) if (folder / INDEX_FILE).is_file() else None
    return _fetched(name, revision, [SINGLE_FILE] if index is None else set(index.values()))


def _fetched(name: str, revision: str | None, patterns: Iterable[str]) -> Path:
    try:
        return fetch(name, revision, patterns)
    except Exception as error:
        raise FlexGenError(
            f"The model '{name}' could not be fetched from the hub ({type(error).__name__}: {error}). Check the name and the "
            "network, or give the path of a folder that holds it."
        ) from error
