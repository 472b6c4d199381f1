"""Loading a model folder or hub name: config first, so that what is refused is refused before any weight is read."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from flexgen_helm.errors import CorruptFile, FlexGenError, UnsupportedModel

logger = logging.getLogger(__name__)

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
DEFAULT_CONTEXT = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model as the library made it, and what the engine must know about it."""

    name: str
    folder: Path
    """Where its files are on this machine."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int
    """Longest input with its new tokens, in tokens."""
    length_reason: str
    """Why the context ends there, for messages."""
    vocab_size: int
    end_token_ids: frozenset[int]


def load_model(name_or_path: str, *, dtype: str, device: torch.device, revision: str | None = None) -> LoadedModel:
    """Load config, weights and tokenizer.

    Args:
        name_or_path: A folder, or a name on the model hub.
        dtype: "auto" (the checkpoint's on a GPU, float32 on a CPU), "float32", "bfloat16" or "float16".
        device: Where the matrices are multiplied.
        revision: Of a hub name.

    Raises:
        UnsupportedModel: If the model is of a kind that cannot be run; nothing was read but its config.
        CorruptFile: If weights or tokenizer cannot be read.
    """
    folder = _local_folder(name_or_path, revision)
    config = _read_config(name_or_path, folder)
    _refuse_by_config(name_or_path, folder, config)
    max_length, length_reason = _context(config)
    model = _read_weights(name_or_path, folder, _dtype(dtype, config, device))
    text = config.get_text_config(decoder=True)
    kinds = _growing_rope(model)
    if kinds:
        original = _original_length(text)
        max_length = min(max_length, original)
        length_reason = f"its original length, beyond which '{kinds[0]}' rotary embeddings change with the longest sequence"
        logger.info("%s: jobs up to %s tokens (%s)", name_or_path, max_length, length_reason)
    tokenizer = _read_tokenizer(name_or_path, folder)
    end_ids = _end_token_ids(model)
    return LoadedModel(
        name_or_path,
        folder,
        _placed(model, device, name_or_path),
        tokenizer,
        max_length,
        length_reason,
        text.vocab_size,
        end_ids,
    )


def _local_folder(name: str, revision: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith("."):
        raise FlexGenError(f"There is no folder {path}. Give an existing model folder, or a hub name such as 'org/model'.")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise FlexGenError(
            f"The model '{name}' could not be fetched from the hub ({type(error).__name__}: {error}). Check the name and the "
            "network, or give the path of a folder that holds it."
        ) from error


def _read_config(name: str, folder: Path) -> PreTrainedConfig:
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UnsupportedModel(f"{name} is a LoRA adapter, not a model. Merge it into its base model and give that folder.")
    if not (folder / "config.json").exists():
        raise FlexGenError(f"{folder} has no config.json, so it is no model folder. Give the folder that holds it.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UnsupportedModel(
            f"{name}: this version of transformers cannot read its config ({type(error).__name__}: {error}). Code that ships "
            "with a checkpoint (trust_remote_code) is never run; upgrade transformers if it knows the family by now."
        ) from error
    return config


def _refuse_by_config(name: str, folder: Path, config: PreTrainedConfig) -> None:
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} ({kind}) is an encoder-decoder. Give a decoder-only causal language model.")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModel(f"{name} ({kind}) is not among the causal language models of transformers.")
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise UnsupportedModel(f"{name} ({kind}) is already quantised ({method}). Give the unquantised checkpoint.")
    if not any(folder.glob("*.safetensors")):
        raise UnsupportedModel(
            f"{name} ({kind}) has no .safetensors files in {folder}; pickled weights are never loaded, since they can run "
            "code. Convert them with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )


def _context(config: PreTrainedConfig) -> tuple[int, str]:
    text = config.get_text_config(decoder=True)
    for name in CONTEXT_NAMES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value, f"its config's {name}"
    return DEFAULT_CONTEXT, "the default, since its config names no context length"


def _dtype(name: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    if name == "auto":
        own = getattr(config, "dtype", None)
        return own if device.type != "cpu" and isinstance(own, torch.dtype) else torch.float32
    if name not in DTYPES:
        raise FlexGenError(f"dtype is {name!r}. Give 'auto' or one of {', '.join(map(repr, DTYPES))}.")
    return DTYPES[name]


def _read_weights(name: str, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        # Weights arrive tensor by tensor in the wanted dtype: the model is never held twice.
        with _quiet_without_terminal():
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except Exception as error:
        raise CorruptFile(
            f"The weights of {name} could not be read ({type(error).__name__}: {error}). A shard may be torn or missing in "
            f"{folder}: fetch it again."
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if missing:
        raise CorruptFile(
            f"The weights of {name} lack {len(missing)} tensors of its config, or have them in another shape: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Fetch {folder} again."
        )
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


@contextmanager
def _quiet_without_terminal() -> Iterator[None]:
    """Keep the library's bar out of logs."""
    shown = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _read_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase | None:
    if not any(
        (folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        logger.info("%s has no tokenizer: jobs must give token_ids", name)
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise CorruptFile(f"The tokenizer in {folder} could not be read ({type(error).__name__}: {error}).") from error
    return tokenizer


def _end_token_ids(model: PreTrainedModel) -> frozenset[int]:
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = own if own is not None else model.config.get_text_config(decoder=True).eos_token_id
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])


def _growing_rope(model: nn.Module) -> list[str]:
    """Kinds of rotary embedding in use whose frequencies follow the longest position of a row."""
    kinds: set[str] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds.update(kind.values() if isinstance(kind, dict) else [kind] if isinstance(kind, str) else [])
    return sorted(kind for kind in kinds if kind == "longrope" or "dynamic" in kind)


def _original_length(text: Any) -> int:
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    found = [value.get("original_max_position_embeddings") for value in (rope, *nested)]
    found.append(getattr(text, "original_max_position_embeddings", None))
    return min((value for value in found if isinstance(value, int)), default=text.max_position_embeddings)


def _placed(model: PreTrainedModel, device: torch.device, name: str) -> PreTrainedModel:
    if device.type != "cuda":
        return model
    needed = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise FlexGenError(
            f"{name} needs {needed / 2**30:.1f} GiB on {device}, where {free / 2**30:.1f} GiB are free. Use device='cpu'; "
            "weights on several tiers are not supported yet."
        )
    model.to(device)  # type: ignore[arg-type]
    return model
