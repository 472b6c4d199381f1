"""Read generation_config.json, and find the fields that would change greedy answers if they were applied."""

from __future__ import annotations

import logging
import reprlib
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import InfNanRemoveLogitsProcessor, LogitNormalization

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.loading.refusals import present, read_json

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
"""Name of the file in a model folder."""
OF_REQUESTS = ("do_sample", "max_length", "max_new_tokens", "num_return_sequences")
"""Fields that are ignored because every request sets them."""
HARMLESS = (InfNanRemoveLogitsProcessor, LogitNormalization)
"""Logits processors of transformers that do not change the order of finite logits."""
OUTSIDE_PROCESSORS = {"token_healing": True, "cache_implementation": "quantized"}
"""Values of fields that change greedy answers outside of logits processors, stopping criteria and decoding mode."""


def read_generation_config(name: str, folder: Path) -> GenerationConfig:
    """Read generation_config.json, or the generation fields of config.json if that file does not exist.

    Args:
        name: The model's name, for messages.
        folder: The model folder; the weights may be missing.

    Raises:
        CorruptFile: If the file is torn.
        UnsupportedModel: If transformers cannot read the file, or eos_token_id holds something other than token ids.
    """
    own = present(folder / FILE)
    if own:
        read_json(folder / FILE)  # A torn file is an error here; transformers would silently read config.json instead.
    source: dict[str, Any] = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True, **source)
    except Exception as error:
        raise UnsupportedModel(
            f"{name}: transformers {transformers.__version__} cannot read its {FILE if own else 'config.json'} as settings of "
            f"generation ({type(error).__name__}: {error}). Correct the field that is named, or remove it."
        ) from error
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if not all(end is None or type(end) is int for end in ends):
        raise UnsupportedModel(
            f"{name}: eos_token_id of its {FILE if own else 'config.json'} is {config.eos_token_id!r}, neither a token "
            "id nor a list of token ids. Correct the file."
        )
    return config


def warn_of_unapplied_fields(name: str, model: PreTrainedModel) -> None:
    """Log one warning that names the fields found by `unapplied_fields`, if there are any.

    Args:
        name: The model's name, for the message.
        model: The model with its generation config.
    """
    found = unapplied_fields(model)
    if found:
        logger.warning(
            "%s: its %s sets %s. These settings are not applied: HELM asks for the distribution of the model itself. Answers "
            "can differ from those of transformers' generate",
            name,
            "config.json" if getattr(model.generation_config, "_from_model_config", False) else FILE,
            ", ".join(f"{field}={reprlib.repr(value)}" for field, value in found.items()),
        )


def unapplied_fields(model: PreTrainedModel) -> dict[str, Any]:
    """Return the fields of a model's generation config, with values, that would change greedy answers of `generate`.

    transformers decides: a field counts if it changes the logits processors, stopping criteria or decoding mode that `generate`
    would use.
    """
    config: GenerationConfig | None = model.generation_config
    if config is None:
        return {}
    plain = _decoding(model, {})
    fields = {name: value for name, value in config.to_diff_dict().items() if hasattr(config, name) and name not in OF_REQUESTS}
    return {
        name: value
        for name, value in fields.items()
        if OUTSIDE_PROCESSORS.get(name, ()) == value or _decoding(model, {name: getattr(config, name)}) != plain
    }


def _decoding(model: Any, fields: dict[str, Any]) -> list[str]:
    """Return the decoding mode, processors and criteria that `generate` would use with these fields, or how it would fail."""
    any_tokens = torch.ones(1, 1, dtype=torch.long)
    config = GenerationConfig(**GenerationConfig._get_default_generation_params())
    vars(config).update(fields, _eos_token_tensor=any_tokens[0])
    options = {"input_ids_seq_length": 1, "encoder_input_ids": any_tokens, "device": "cpu"}
    try:
        processors = model._get_logits_processor(config, **options)
        criteria = model._get_stopping_criteria(config, stopping_criteria=[], tokenizer=None)
        mode = config.get_generation_mode()
    except Exception as error:
        return [repr(error)]
    if mode is GenerationMode.ASSISTED_GENERATION:  # gives the same tokens, faster
        mode = GenerationMode.GREEDY_SEARCH
    steps = [each for each in (*processors, *criteria) if not isinstance(each, HARMLESS)]
    return [mode.value, *(type(each).__name__ for each in steps)]
