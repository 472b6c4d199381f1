"""Small tokenizers of the kinds in use, trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog's owner doesn't mind at all.",
    "Question: What is the capital of France?\nA. Paris\nB. Rome\nAnswer: A\n\n",
    "naïve café, Größe, señor — “quoted” 中文 日本語 😀 def f(x):\n    return x + 1\n",
] * 20

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(*, adds_bos: bool = False) -> PreTrainedTokenizerBase:
    """Like GPT-2, Llama 3, Qwen: every string is made of bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False),
    )
    return _wrap(backend, adds_bos)


def metaspace_bpe(*, adds_bos: bool = False) -> PreTrainedTokenizerBase:
    """Like Llama 2: a space begins each text, unknown characters become bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, limit_alphabet=60, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    state = json.loads(backend.to_str())["model"]
    names = SPECIAL + BYTES + [name for name in state["vocab"] if name not in SPECIAL]
    merges = [tuple(pair) for pair in state["merges"]]
    model = models.BPE({name: index for index, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True)
    llama = Tokenizer(model)
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    llama.add_special_tokens(SPECIAL)
    return _wrap(llama, adds_bos)


def metaspace_unigram() -> PreTrainedTokenizerBase:
    """Like SentencePiece's Unigram with byte fallback."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    learned = [tuple(entry) for entry in json.loads(backend.to_str())["model"]["vocab"][len(SPECIAL) :]]
    # The letters of other scripts go, so that they fall back to bytes.
    learned = [entry for entry in learned if all(ord(character) < 256 or character == "▁" for character in entry[0])]
    vocab = [(name, 0.0) for name in SPECIAL] + [(name, -20.0) for name in BYTES] + learned
    unigram = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    unigram.add_special_tokens(SPECIAL)
    return _wrap(unigram, adds_bos=False)


def wordpiece() -> PreTrainedTokenizerBase:
    """Like BERT: words, and pieces that continue them; spaces are not tokens."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return _wrap(backend, adds_bos=False)


def slow_wordpiece(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer written in Python, whose tokens are joined by spaces."""
    vocab = sorted(wordpiece().get_vocab().items(), key=lambda item: item[1])
    file = folder / "vocab.txt"
    file.write_text("\n".join(name for name, _ in vocab) + "\n", encoding="utf-8")
    return BertTokenizerLegacy(
        str(file),
        do_lower_case=False,
        unk_token="<unk>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<|im_end|>",
    )


def slow_bytes() -> PreTrainedTokenizerBase:
    """A tokenizer written in Python that drops unfinished characters instead of replacing them."""
    return ByT5Tokenizer(extra_ids=0)


def _wrap(backend: Tokenizer, adds_bos: bool) -> PreTrainedTokenizerBase:
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
