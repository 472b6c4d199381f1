"""A model that costs next to nothing: one layer, hidden size 16, random weights, and a real tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig


def save_null_model(folder: Path, tokenizer_folder: Path) -> Path:
    """Make the model's folder; it has no end token, so that every answer is as long as asked.

    Args:
        folder: To be made.
        tokenizer_folder: Whose ``tokenizer*`` files are taken.
    """
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer_folder)),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for file in tokenizer_folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
