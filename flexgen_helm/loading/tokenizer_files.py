"""Read the tokenizer of a model folder as its tokenizer.json describes it, even if a transformers class would change it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available

from flexgen_helm.errors import CorruptFile, FlexGenError, UnsupportedModel
from flexgen_helm.loading.refusals import present, read_json

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""Files of which a folder with a tokenizer has at least one."""
OTHER_JSON_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.json")
"""Optional files of a tokenizer that must be valid JSON."""
PIPELINE = ("normalizer", "pre_tokenizer", "decoder")
"""Parts of a tokenizer.json that transformers classes replace by their own."""
SENTENCEPIECE = b"\n"
"""First byte of every SentencePiece model. tiktoken's files, which are text, may have the same name."""


def read_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase | None:
    """Read the tokenizer of a model folder. Code that ships with it is never run.

    Args:
        name: The model's name, for messages.
        folder: The model folder; the weights may be missing.

    Returns:
        The tokenizer, or None if the folder has none.

    Raises:
        UnsupportedModel: If the tokenizer cannot be read without its own code.
        CorruptFile: If one of its files is torn, or transformers cannot read them.
        FlexGenError: If a package that reads its files is not installed.
    """
    if not any(present(folder / file) for file in TOKENIZER_FILES):
        logger.info("%s has no tokenizer: jobs must give token_ids", name)
        return None
    contents = {file.name: read_json(file) for file in _json_files(folder)}
    _refuse_torn_template(folder / "chat_template.jinja")
    brings_code = "auto_map" in contents.get("tokenizer_config.json", {})
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise _unreadable(name, folder, brings_code, error) from error
    if brings_code:
        logger.info("%s: its tokenizer's own code is not run; transformers' %s is used", name, type(tokenizer).__name__)
    if "tokenizer.json" in contents:
        _follow_file(name, tokenizer, folder / "tokenizer.json")
    return tokenizer


def _json_files(folder: Path) -> list[Path]:
    names = [file for file in (*TOKENIZER_FILES, *OTHER_JSON_FILES) if file.endswith(".json")]
    return [folder / file for file in names if present(folder / file)]


def _refuse_torn_template(file: Path) -> None:
    if present(file):
        try:
            file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise CorruptFile(
                f"{file} cannot be read as text ({type(error).__name__}: {error}). Fetch that file again."
            ) from error


def _follow_file(name: str, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Give a tokenizer the pipeline of its tokenizer.json if its class has built one of its own.

    Classes with an ``__init__`` read vocabulary and merges from the file, but define the other parts in code.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or "__init__" not in vars(type(tokenizer)):
        return
    made, written = tokenizer.backend_tokenizer, Tokenizer.from_file(str(file))
    replaced = [part for part in PIPELINE if _state(made, part) != _state(written, part)]
    known = {repr(token) for token in written.get_added_tokens_decoder().values()}
    written.add_tokens([token for _, token in sorted(made.get_added_tokens_decoder().items()) if repr(token) not in known])
    written.post_processor, written.encode_special_tokens = made.post_processor, made.encode_special_tokens
    tokenizer._tokenizer = written
    if replaced:
        logger.info(
            "%s: the %s of tokenizer.json is used, not that of transformers' %s",
            name,
            " and the ".join(replaced),
            type(tokenizer).__name__,
        )


def _state(tokenizer: Tokenizer, part: str) -> Any:
    found = getattr(tokenizer, part)
    return None if found is None else found.__getstate__()


def _unreadable(name: str, folder: Path, brings_code: bool, error: Exception) -> FlexGenError:
    reason = f"{type(error).__name__}: {error}"
    if brings_code:
        return UnsupportedModel(
            f"{name}: its tokenizer brings its own code (trust_remote_code), which is never run, and cannot be read "
            f"without it ({reason}). Put a tokenizer.json into the folder, or remove tokenizer_config.json and give token_ids."
        )
    model = folder / "tokenizer.model"
    if not present(folder / "tokenizer.json") and present(model) and model.read_bytes()[:1] == SENTENCEPIECE:
        readers = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
        missing = [package for package, available in readers.items() if not available]
        if missing:
            return FlexGenError(
                f"{name}: its tokenizer.model is read with the packages sentencepiece and protobuf, and "
                f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed. "
                "Run `pip install sentencepiece protobuf`, or put a tokenizer.json into the folder."
            )
    if isinstance(error, ImportError):
        return FlexGenError(f"{name}: its tokenizer needs a package that is not installed ({reason}). Install that package.")
    return CorruptFile(
        f"The tokenizer in {folder} could not be read ({reason}). Fetch its files again, or correct the field that is named. "
        "Without its files, jobs can still give token_ids."
    )
