"""Tokenizers for the tiny models, so simple that what they must do can be written down."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from string import ascii_lowercase

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.dimensions import VOCAB_SIZE

SPECIAL = ["<pad>", "<s>", "</s>"]
PAIRS = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)][: VOCAB_SIZE - len(SPECIAL)]
BOS = 1


def save_pair_tokenizer(folder: Path, *, adds_bos: bool = False, template: str | None = None) -> None:
    """Saves a tokenizer whose tokens are pairs of letters: ``"aaab"`` is the tokens ``aa`` and ``ab``.

    Args:
        folder: A model folder.
        adds_bos: Whether it puts ``<s>`` before a text by itself.
        template: What else it puts around a text, such as ``"</s> <s> $A"``.
    """
    vocab = {token: number for number, token in enumerate([*SPECIAL, *PAIRS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    template = "<s> $A" if adds_bos else template
    if template:
        special = [(token, vocab[token]) for token in SPECIAL]
        tokenizer.post_processor = processors.TemplateProcessing(template.strip(), special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)


def save_character_tokenizer(folder: Path) -> None:
    """Saves a tokenizer that splits any text into characters; pairs of letters are tokens that only a model can choose.

    The last token, which ends the answers of tiny models, is ``</s>``, the only special one.
    """
    characters = ["\n", *map(chr, range(32, 127)), *"\N{EN DASH}\N{EM DASH}\N{RIGHT SINGLE QUOTATION MARK}"]
    tokens = [*characters, *PAIRS][: VOCAB_SIZE - 1]
    vocab = {token: number for number, token in enumerate([*tokens, "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def text_of(token_ids: list[int]) -> str:
    """Returns the letters of tokens."""
    return "".join([*SPECIAL, *PAIRS][token] for token in token_ids)
