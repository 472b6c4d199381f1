"""Read the config of a model folder, and refuse unsupported models before any weight is read, with reason and alternative."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flexgen_helm.errors import CorruptFile, FlexGenError, UnsupportedModel

logger = logging.getLogger(__name__)

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.ot")
"""Patterns of the names of weight files of PyTorch, TensorFlow, Flax and Rust."""
QUANTISED_BY = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "NVIDIA ModelOpt"}
"""Files of older quantisation tools, which do not mention quantisation in config.json, with the name of the method."""
DEQUANTISE = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Quantisation methods that transformers can undo, with the name of the config class for it."""
CAUSAL_ANYWAY = ("gpt_neox", "gpt_neox_japanese", "trocr")
"""Model types that are decoders even if their config says ``is_decoder=False``."""
LANGUAGE_MAPPINGS = ("CAUSAL_LM", "MASKED_LM", "PRETRAINING", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
"""Names of transformers' tables of tasks whose checkpoints have a head that predicts tokens."""
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
"""Config fields that must be at least 1. transformers maps the names of other model types to these."""
OWN_ATTENTION = ("eager", "sdpa")
"""Attention implementations that every installation of transformers has."""


def refuse_files(name: str, folder: Path) -> None:
    """Refuse a folder whose file names show that it is not an unquantised model of transformers.

    Args:
        name: The model's name, for messages.
        folder: The model folder; the weights may be missing.

    Raises:
        UnsupportedModel: If the folder holds an adapter, a checkpoint quantised by an older tool, or only GGUF files.
        FlexGenError: If the folder has no config.json.
    """
    if present(folder / "adapter_config.json"):
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "the model that it was trained on"
        raise UnsupportedModel(
            f"{name} holds a LoRA or other PEFT adapter of {base}, not a whole model. Merge the two and give the result: "
            f"PeftModel.from_pretrained(base_model, {name!r}).merge_and_unload().save_pretrained(folder)."
        )
    for file, method in QUANTISED_BY.items():
        if present(folder / file):
            raise UnsupportedModel(_quantised(name, method, f"it has a {file}"))
    if not present(folder / "config.json"):
        _refuse_gguf(name, folder)
        raise FlexGenError(f"{folder} has no config.json, so it is no model folder. Give the folder that holds it.")


def refuse_file(path: Path) -> None:
    """Refuse a path that is a file, not a folder. It always raises.

    Raises:
        UnsupportedModel: If the file is a GGUF file.
        FlexGenError: If it is any other file.
    """
    if path.suffix == ".gguf":
        raise UnsupportedModel(_gguf(str(path), path.name))
    raise FlexGenError(f"{path} is a file. Give the folder that holds the model's config.json and .safetensors files.")


def read_config(name: str, folder: Path) -> PreTrainedConfig:
    """Read config.json with transformers' own classes. Code that ships with a checkpoint is never run.

    Args:
        name: The model's name, for messages.
        folder: The model folder; the weights may be missing.

    Raises:
        CorruptFile: If the file is torn.
        UnsupportedModel: If transformers does not know the model type, or cannot read the config.
    """
    fields = read_json(folder / "config.json")
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if fields.get("auto_map"):
            raise UnsupportedModel(
                f"{name} ({kind}) brings its own modelling code (trust_remote_code), which is never run, and transformers "
                f"{transformers.__version__} has none for this type. Give a model of a type that transformers knows, or "
                "upgrade transformers if it knows this one by now."
            )
        raise UnsupportedModel(
            f"{name}: its config.json names the model type {kind!r}, which transformers {transformers.__version__} does not "
            "know. Upgrade transformers if it knows the type by now, or give another model."
        )
    if fields.get("auto_map"):
        logger.info("%s (%s): its own modelling code is not run; transformers' code is used", name, kind)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise UnsupportedModel(
            f"{name} ({kind}): transformers {transformers.__version__} cannot read its config.json "
            f"({type(error).__name__}: {error}). Correct the file, or upgrade transformers if the type has changed since."
        ) from error
    _leave_out_foreign_attention(name, config)
    return config


def refuse_config(name: str, config: PreTrainedConfig) -> None:
    """Refuse a config that is not that of a causal language model with unquantised weights.

    Args:
        name: The model's name, for messages.
        config: The config as `read_config` returned it.

    Raises:
        UnsupportedModel: If the model is an encoder-decoder, an encoder, trained for another task, or quantised; if a size in
            the config is less than 1; or if the config names other weight files.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{name} ({kind}) is an encoder-decoder: its prompt goes through an encoder, which packed or single rows of a "
            "decoder do not have. Give a decoder-only causal language model."
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModel(
            f"{name} ({kind}) is not among the causal language models of transformers {transformers.__version__}. Give a "
            "model that AutoModelForCausalLM loads."
        )
    _refuse_encoder(name, config)
    _refuse_other_task(name, config)
    _refuse_sizes(name, config)
    for part in (config, config.get_text_config(decoder=True)):
        for field in ("quantization_config", "compression_config"):
            quantised = getattr(part, field, None)
            if quantised:
                settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
                raise UnsupportedModel(_quantised(f"{name} ({kind})", _method(settings), f"its config has a {field}"))
    if getattr(config, "transformers_weights", None):
        raise UnsupportedModel(
            f"{name} ({kind}): its config keeps the weights in {config.transformers_weights} (transformers_weights), which is "
            "not supported. Rename that file to model.safetensors and remove the field."
        )


def refuse_weights(name: str, folder: Path) -> None:
    """Refuse a folder without safetensors files. Call it after the weights were downloaded.

    Args:
        name: The model's name, for messages.
        folder: The model folder.

    Raises:
        UnsupportedModel: If the folder has pickled or GGUF weights instead.
        CorruptFile: If the folder has no weights at all.
    """
    if any(folder.glob("*.safetensors*")):
        return
    _refuse_gguf(name, folder)
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if not pickles:
        raise CorruptFile(f"{name} has no weights: {folder} has no .safetensors files. Fetch it again, with its weights.")
    raise UnsupportedModel(
        f"{name} has no .safetensors files but {pickles[0]}; pickled weights can run code when they are read, so they never "
        "are. If you trust them, convert them once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
    )


def present(path: Path) -> bool:
    """Return whether a folder lists a file. A dangling link to a file that was not downloaded counts."""
    return path.is_symlink() or path.exists()


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        CorruptFile: If the file cannot be read, or holds anything else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{path} cannot be read as JSON ({type(error).__name__}: {error}). Fetch that file again.") from error
    if not isinstance(content, dict):
        raise CorruptFile(f"{path} holds no JSON object. Fetch that file again.")
    return content


def _leave_out_foreign_attention(name: str, config: PreTrainedConfig) -> None:
    """Remove from a config the request for an attention implementation that needs another package: the engine has its own."""
    for part in (config, *(getattr(config, field) for field in config.sub_configs)):
        asked = getattr(part, "_attn_implementation", None)
        if asked not in (None, *OWN_ATTENTION):
            logger.info("%s: config.json asks for the attention %r, which is not used", name, asked)
            part._attn_implementation = None


def _refuse_sizes(name: str, config: PreTrainedConfig) -> None:
    text = config.get_text_config(decoder=True)
    for field in SIZES:
        size = getattr(text, field, None)
        if type(size) is int and size < 1:
            raise UnsupportedModel(
                f"{name} ({config.model_type}): {field} of its config.json is {size}, but a model has at least 1. Correct the "
                "file, or fetch it again."
            )


def _refuse_other_task(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model whose architectures are all of another task. The check of the weights decides about unknown ones."""
    entry: Any = config.architectures or []
    named = [entry] if isinstance(entry, str) else [each for each in entry if isinstance(each, str)]
    language = {task for mapping in LANGUAGE_MAPPINGS for task in _tasks(f"MODEL_FOR_{mapping}_MAPPING_NAMES")}
    others = {task for mapping in vars(modeling_auto) for task in _tasks(mapping)} - language
    if named and all(_task(each) in others or "Reward" in each for each in named):
        raise UnsupportedModel(
            f"{name} ({config.model_type}) is a {named[0]} (architectures in its config.json), not a causal language model: it "
            "has no trained head that predicts tokens. Give the language model that it was made from, or correct architectures "
            "if the entry is wrong."
        )


def _tasks(mapping: str) -> set[str]:
    """Return the tasks of the classes in one of transformers' tables, such as SequenceClassification."""
    if not (mapping.startswith("MODEL_FOR_") and mapping.endswith("_MAPPING_NAMES")):
        return set()
    entries = vars(modeling_auto).get(mapping, {}).values()
    return {_task(each) for entry in entries for each in ([entry] if isinstance(entry, str) else entry)} - {""}


def _task(architecture: str) -> str:
    return re.split("For(?=[A-Z])", architecture)[-1] if re.search("For(?=[A-Z])", architecture) else ""


def _refuse_encoder(name: str, config: PreTrainedConfig) -> None:
    kind = config.model_type
    # The classes of encoder-decoders make themselves decoders when they are loaded as causal language models.
    becomes_decoder = kind in CAUSAL_ANYWAY or CONFIG_MAPPING[kind].is_encoder_decoder
    if getattr(config, "is_decoder", None) is False and not becomes_decoder:
        reason, remedy = "is_decoder is false", ", or set is_decoder in its config.json if it was trained as a decoder"
    elif kind == "xlm" and not config.causal:
        reason, remedy = "causal is false", ", or set causal in its config.json if it was trained so"
    elif kind == "xlnet":
        reason, remedy = "it predicts tokens in any order", ""
    else:
        return
    raise UnsupportedModel(
        f"{name} ({kind}) is an encoder ({reason}): its tokens attend to those after them, so it has no probability of a next "
        f"token. Give a causal language model{remedy}."
    )


def _method(settings: dict[str, Any]) -> str:
    method = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "an unnamed method")
    bits = settings.get("bits") or settings.get("w_bit")
    return f"{getattr(method, 'value', method)}{f', {bits} bits' if bits else ''}"


def _quantised(name: str, method: str, sign: str) -> str:
    undo = DEQUANTISE.get(method)
    convert = (
        f", or convert this one once: AutoModelForCausalLM.from_pretrained(folder, quantization_config={undo}(dequantize=True))"
        ".save_pretrained(new_folder)"
        if undo
        else ""
    )
    return (
        f"{name} is already quantised ({method}; {sign}): its weights are packed for other kernels. "
        f"Give the unquantised 16-bit checkpoint{convert}."
    )


def _refuse_gguf(name: str, folder: Path) -> None:
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if files:
        raise UnsupportedModel(_gguf(name, files[0]))


def _gguf(name: str, file: str) -> str:
    return (
        f"{name} is in the GGUF format of llama.cpp ({file}), not a checkpoint of transformers. Give the 16-bit safetensors "
        "checkpoint that it was made from."
    )
