"""Conversion of a Llama-type GGUF file with a GPT-2-type tokenizer into a plain Hugging Face folder.

``transformers`` can read such files itself, but takes 45 seconds for SmolLM2-135M, drops the splitting of digits from
its tokenizer and leaves a quantization config on weights that are dense. Here the ``gguf`` package parses the file and
dequantises its tensors, and ``transformers`` and ``tokenizers`` write the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flexgen_helm.errors import CorruptFile, UnsupportedModel

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

Array = npt.NDArray[Any]

# Names of llama.cpp (gguf-py, constants.py) and of transformers' Llama.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_SUPPORTED = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
_CONTROL_TOKEN = 3


class GgufFile(NamedTuple):
    """A parsed GGUF file."""

    fields: dict[str, Any]
    """Metadata by name: numbers, strings, and lists of them."""
    tensors: dict[str, Array]
    """Dequantised fp32 arrays by llama.cpp's names; linear weights are ``[out, in]``."""


def read_gguf(path: Path) -> GgufFile:
    """Parse a GGUF file and dequantise all of its tensors.

    Raises:
        CorruptFile: If the file is not a complete GGUF file.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    except (ValueError, IndexError) as error:
        raise CorruptFile(f"{path} is not a complete GGUF file ({error}). Download or convert it again.") from error
    return GgufFile(fields, tensors)


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the configs, ``model.safetensors`` in float16 and the tokenizer into an existing folder.

    There is no chat template: HELM's own Hugging Face client applies any template that it finds, even where
    log-probabilities of a plain prompt are wanted.

    Raises:
        CorruptFile: If the file is not a complete GGUF file.
        UnsupportedModel: If it holds another architecture or another kind of tokenizer.
    """
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    gguf_file = read_gguf(path)
    fields = gguf_file.fields
    for name, supported in _SUPPORTED.items():
        if fields.get(name) != supported:
            raise UnsupportedModel(
                f"{path.name} has {name} = {fields.get(name)}, but only {supported} is converted. "
                "Use a Hugging Face folder of the model instead."
            )
    weights = _convert_tensors(gguf_file)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = _make_config(fields, tied="lm_head.weight" not in weights)
    config.save_pretrained(folder)
    special_tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special_tokens).save_pretrained(folder)
    _make_tokenizer(fields).save_pretrained(folder)


def _convert_tensors(gguf_file: GgufFile) -> dict[str, Array]:
    """Rename the tensors, undo llama.cpp's order of the rotary dimensions, and round to float16."""
    num_heads = {
        "attn_q": gguf_file.fields["llama.attention.head_count"],
        "attn_k": gguf_file.fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, tensor in gguf_file.tensors.items():
        if name in _OTHER_NAMES:
            new_name = _OTHER_NAMES[name]
        else:
            _, layer, part, kind = name.split(".")
            new_name = f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
            if part in num_heads:
                tensor = _rotate_halves(tensor, num_heads[part])
        weights[new_name] = np.ascontiguousarray(tensor, dtype=np.float16)
    return weights


def _rotate_halves(weight: Array, num_heads: int) -> Array:
    """Reorder the rows of a Q or K projection, ``[n_h * d, h]``.

    llama.cpp rotates neighbouring dimensions (0, 1), (2, 3), ...; transformers rotates i together with i + d / 2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _make_config(fields: dict[str, Any], *, tied: bool) -> LlamaConfig:
    from transformers import LlamaConfig

    hidden_size, num_heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float16",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden_size,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=num_heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=hidden_size // num_heads,
        max_position_embeddings=fields["llama.context_length"],
        # The file holds the fp32 neighbour of a short decimal number, the model was made with the number itself.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        tie_word_embeddings=tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def _make_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return the byte-level BPE of the file behind a pre-tokenizer that splits digits.

    "smollm" is how llama.cpp calls that pair; without the first part, ids differ where spaces precede digits.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: id_ for id_, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
