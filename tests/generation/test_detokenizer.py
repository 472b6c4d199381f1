"""Incremental text and token texts against each tokenizer's own decoding of the whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote_to_bytes

import pytest
from helm.benchmark.metrics.basic_metrics import convert_tokens_to_text, get_num_bytes
from helm.common.request import Token
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.errors import FlexGenError
from flexgen_helm.generation.detokenizer import Detokenizer, token_texts
from flexgen_helm.generation.vocabulary import REPLACEMENT, Vocabulary
from tests import tiny_tokenizers

EXAMPLES = settings(derandomize=True, max_examples=60, deadline=None)

BYTE_LEVEL = ["smollm2", "byte_level"]
BYTE_FALLBACK = ["metaspace_bpe", "metaspace_unigram"]
EXACT = [*BYTE_LEVEL, *BYTE_FALLBACK]
"""Tokenizers that can write every string."""
KINDS = [*EXACT, "wordpiece", "slow_wordpiece", "slow_bytes"]

texts = st.text(
    st.sampled_from("abe ,.'\n01çé—“中文日😀👩\u200d\u0301\ufffd") | st.characters(exclude_categories=["Cs"]),
    max_size=40,
)
prompts = st.sampled_from(["Hello", "a b ", "x\n", "日本", "The fox: 😀", "doesn'"])


@cache
def vocabulary(kind: str) -> Vocabulary:
    if kind == "smollm2":
        try:
            return Vocabulary(AutoTokenizer.from_pretrained(smollm2_folder()))
        except FlexGenError as error:
            pytest.skip(f"no SmolLM2: {error}")
    if kind == "slow_wordpiece":
        with TemporaryDirectory() as folder:
            return Vocabulary(tiny_tokenizers.slow_wordpiece(Path(folder)))
    return Vocabulary(getattr(tiny_tokenizers, kind)())


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))


def encode(kind: str, text: str) -> list[int]:
    return list(vocabulary(kind).tokenizer.encode(text, add_special_tokens=False))


def behind(kind: str, prompt_ids: list[int], token_ids: list[int]) -> str:
    """The reference: decode everything at once and cut."""
    tokenizer = vocabulary(kind).tokenizer
    before, text = decode(tokenizer, prompt_ids), decode(tokenizer, prompt_ids + token_ids)
    assert text.startswith(before)
    return text[len(before) :]


def run(kind: str, prompt_ids: list[int], token_ids: list[int]) -> Detokenizer:
    detokenizer = Detokenizer(vocabulary(kind), prompt_ids)
    settled = "".join(detokenizer.append(token_id) for token_id in token_ids)
    assert detokenizer.text.startswith(settled)
    assert settled + detokenizer.flush() == detokenizer.text
    return detokenizer


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(prompt=prompts, text=texts)
def test_text_behind_a_prompt_is_that_of_the_whole(kind: str, prompt: str, text: str) -> None:
    prompt_ids, token_ids = encode(kind, prompt), encode(kind, text)
    assert run(kind, prompt_ids, token_ids).text == behind(kind, prompt_ids, token_ids)


@pytest.mark.parametrize("kind", EXACT)
@EXAMPLES
@given(text=texts)
def test_text_at_a_start_is_the_text(kind: str, text: str) -> None:
    # Unigram writes no two spaces and no space at the end; that is the tokenizer's own doing.
    assert run(kind, [], encode(kind, text)).text == decode(vocabulary(kind).tokenizer, encode(kind, text))


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@settings(EXAMPLES, max_examples=12)
@given(data=st.data())
def test_random_bytes_decode_as_the_whole(kind: str, data: st.DataObject) -> None:
    """Tokens of a model that babbles: broken characters anywhere, in long runs too."""
    tokenizer = vocabulary(kind).tokenizer
    single = st.sampled_from([tokenizer.get_vocab()[name] for name in "ðŁĺĢâĢĻaĠ"])
    token_ids = data.draw(st.lists(single | st.integers(0, len(tokenizer) - 1), max_size=120))
    prompt_ids = encode(kind, "Hi")
    assert run(kind, prompt_ids, token_ids).text == behind(kind, prompt_ids, token_ids)


@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_broken_bytes_leave_other_characters_alone(kind: str) -> None:
    ids = [*encode(kind, "日"), vocabulary(kind).tokenizer.get_vocab()["<0xFF>"], *encode(kind, "a日")]
    assert run(kind, encode(kind, "x"), ids).text.replace(REPLACEMENT, "").replace(" ", "") == "日a日"


@pytest.mark.parametrize("kind", EXACT)
def test_tokens_of_a_text_behind_special_tokens_are_that_text(kind: str) -> None:
    """SentencePiece begins the text with a space that is not in it, behind BOS too."""
    for text in ("Hello dog", " Hello", "日本 é"):
        ids = encode(kind, text)
        names = token_texts(vocabulary(kind), [vocabulary(kind).tokenizer.bos_token_id] * 3000 + ids)[3000:]
        assert names == token_texts(vocabulary(kind), ids)
        assert get_num_bytes([Token(name, 0.0) for name in names]) == len(decode(vocabulary(kind).tokenizer, ids).encode())


@pytest.mark.parametrize("kind", KINDS)
def test_special_and_unknown_tokens_add_no_text(kind: str) -> None:
    tokenizer = vocabulary(kind).tokenizer
    ids = encode(kind, "Hello dog")
    end = tokenizer.eos_token_id
    assert end is not None
    mixed = [ids[0], end, len(tokenizer) + 5, *ids[1:], end]
    assert run(kind, [], mixed).text == decode(tokenizer, ids)


@pytest.mark.parametrize("kind", EXACT)
def test_leading_space_is_kept(kind: str) -> None:
    detokenizer = run(kind, encode(kind, "The quick"), encode(kind, "The quick brown")[len(encode(kind, "The quick")) :])
    assert detokenizer.text == " brown"


@pytest.mark.parametrize("kind", KINDS)
def test_appending_decodes_a_bounded_number_of_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = vocabulary(kind).tokenizer
    for text in ["word " * 1500, "日本ぬ😀" * 300]:
        token_ids = encode(kind, text)
        decoded = 0
        original = tokenizer.decode

        def count(ids: list[int], original: Callable[..., object] = original, **options: bool) -> object:
            nonlocal decoded
            decoded += len(ids)
            return original(ids, **options)

        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "decode", count)
            detokenizer = Detokenizer(vocabulary(kind), token_ids[:50])
            for token_id in token_ids:
                detokenizer.append(token_id)
        assert decoded < 60 * len(token_ids) + 500


def helm_tokens(texts: list[str]) -> list[Token]:
    return [Token(text=text, logprob=0.0) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(text=texts)
def test_token_texts_join_to_the_text(kind: str, text: str) -> None:
    # Some decoders write spaces around special tokens, which belong to none of them.
    token_ids = [token_id for token_id in encode(kind, text) if not vocabulary(kind).is_special(token_id)]
    parts = token_texts(vocabulary(kind), token_ids)
    assert len(parts) == len(token_ids)
    # HELM's own reader puts tokens that hold parts of characters together.
    joined = "".join(group["text"] for group in convert_tokens_to_text(helm_tokens(parts)))
    assert joined == decode(vocabulary(kind).tokenizer, token_ids, skip_special_tokens=False)
    if joined == text:
        assert get_num_bytes(helm_tokens(parts)) == len(joined.encode())


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(prompt=prompts, text=texts)
def test_token_texts_behind_a_context(kind: str, prompt: str, text: str) -> None:
    prompt_ids, token_ids = encode(kind, prompt), encode(kind, text)
    parts = token_texts(vocabulary(kind), token_ids, prompt_ids)
    joined = "".join(group["text"] for group in convert_tokens_to_text(helm_tokens(parts)))
    specials = {token_id for token_id in token_ids if vocabulary(kind).is_special(token_id)}
    if not specials:
        assert joined == behind(kind, prompt_ids, token_ids)


@pytest.mark.parametrize("kind", EXACT)
def test_parts_of_a_character_are_bytes(kind: str) -> None:
    parts = token_texts(vocabulary(kind), encode(kind, "a ぬ"))
    split = [part for part in parts if part.startswith("bytes:")]
    assert len(split) >= 2
    assert unquote_to_bytes("".join(part[6:] for part in split).replace("\\x", "%")).strip() == "ぬ".encode()


def test_bytes_keep_what_is_complete_in_the_token() -> None:
    tokenizer = vocabulary("smollm2").tokenizer
    token_id = next(i for i in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(i) == "ĠâĢ")
    assert vocabulary("smollm2").text(token_id) == r"bytes:\x20\xe2\x80"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_their_literal_text(kind: str) -> None:
    tokenizer = vocabulary(kind).tokenizer
    ids = encode(kind, "dog")
    parts = token_texts(vocabulary(kind), [*ids, tokenizer.eos_token_id, len(tokenizer) + 1], encode(kind, "The"))
    assert parts[-2:] == [tokenizer.eos_token, ""]


def test_text_that_looks_like_the_convention_is_escaped() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    tokenizer.add_tokens(["bytes:no"])
    parts = token_texts(Vocabulary(tokenizer), tokenizer.encode("bytes:no", add_special_tokens=False))
    assert [group["text"] for group in convert_tokens_to_text(helm_tokens(parts))] == ["bytes:no"]
    assert get_num_bytes(helm_tokens(parts)) == 8


@pytest.mark.parametrize("kind", ["smollm2", "metaspace_bpe", "slow_wordpiece"])
def test_long_prompts_are_fast(kind: str) -> None:
    """Time grows with the length, not with its square: 16 times the tokens take less than 64 times as long."""
    token_ids = (encode(kind, "The quick brown fox jumps over the lazy dog — 日本. ") * 2000)[:16_000]
    token_texts(vocabulary(kind), token_ids)

    def seconds(count: int) -> float:
        start = time.thread_time()  # whatever else the machine does
        token_texts(vocabulary(kind), token_ids[:count])
        return time.thread_time() - start

    assert min(seconds(16_000) for _ in range(3)) < 64 * max(min(seconds(1_000) for _ in range(5)), 1e-3)
