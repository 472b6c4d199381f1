"""Tiny random models that read and write any text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from tests.dimensions import MAX_LENGTH
from tests.models import FAMILIES, scale_weights

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template of SmolLM2 and Qwen."""
ALTERNATING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' if message['role'] == 'user' else message['content'] + eos_token }}"
    "{% endfor %}"
)
"""The chat template of Mistral, which writes its BOS token itself."""


def save_llama(tokenizer: PreTrainedTokenizerBase, folder: Path, *, context: int = MAX_LENGTH) -> Path:
    """Saves a tiny Llama for a tokenizer.

    Args:
        tokenizer: All of its tokens are in the model's vocabulary.
        folder: The model folder.
        context: In tokens.
    """
    torch.manual_seed(17)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": context}
    model: Any = AutoModelForCausalLM.from_config(replace(FAMILIES["llama"], overrides=sizes).build(), dtype=torch.float32)
    scale_weights(model)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=0
    )
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
