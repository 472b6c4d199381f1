"""A tiny random model that reads and writes any text, in several shards, with a chat template."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

CONTEXT = 1024
UNKNOWN = "<beyond>"
"""A token of the tokenizer that the model does not know."""
SPECIAL = ["<pad>", "<s>", "</s>"]
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog's owner doesn't mind at all.",
    "Question: What is the capital of France?\nA. Paris\nB. Rome\nAnswer: A\n\n",
    "naïve café, Größe, señor: “quoted” 中文 日本語 😀 def f(x):\n    return x + 1\n",
] * 20
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPREAD = 0.15
"""Standard deviation of the weights: so large that what is predicted depends on the whole prompt."""


def tiny_model(folder: Path) -> Path:
    """Return the folder of the model, made if it is missing."""
    if folder.exists():
        return folder
    torch.manual_seed(17)
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(TEXTS, vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, chat_template=CHATML, **names)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=SPREAD,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(eos_token_id=2, bos_token_id=1, pad_token_id=0)
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished, max_shard_size="200KB")
    tokenizer.add_tokens([UNKNOWN])
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder
