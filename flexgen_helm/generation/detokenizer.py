"""Turn token ids into text: the growing text of a completion, and one string for each token."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence

from flexgen_helm.generation.vocabulary import REPLACEMENT, Vocabulary

_MAX_HELD = 16
"""Number of tokens that may wait for the end of a character, before the text of all but the last few is settled."""

_MAX_INCOMPLETE = 3
"""Largest number of tokens of an unfinished character: a character of UTF-8 has at most four bytes, and lacks one."""

_MAX_CONTEXT = 16
"""Largest number of prompt tokens that are decoded together with the first generated tokens."""


class Detokenizer:
    """Decodes the text of one continuation, as it reads after its prompt.

    Each token is decoded together with a few tokens before it, because a tokenizer may strip the space at the start of a text.
    Text is *settled* once no later token can change it; an unfinished character is not settled. Special tokens add no text.
    Each `append` decodes a bounded number of tokens.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int] = ()) -> None:
        """Start an empty continuation.

        Args:
            vocabulary: The tokenizer's vocabulary.
            prompt_ids: Token ids of the prompt.
        """
        self._vocabulary = vocabulary
        self._context = _plain_context(vocabulary, prompt_ids)
        self._context_text = vocabulary.decode(self._context)
        self._held: list[int] = []
        self._tail = ""
        self._settled: list[str] = []
        self._num_settled = 0

    @property
    def text(self) -> str:
        """Decoded text of all tokens so far, with replacement characters for unfinished characters."""
        return "".join(self._settled) + self._tail

    def start_of(self, token_id: int) -> tuple[int, bool]:
        """Return in which character the text of a token begins that comes next, and whether it goes on with that character."""
        decoder = getincrementaldecoder("utf-8")(errors="replace")
        finished = decoder.decode(b"".join(map(self._vocabulary.piece, self._held)))
        unfinished, end = decoder.getstate()[0], self._num_settled + len(self._tail)
        if not _goes_on(unfinished, self._vocabulary.piece(token_id)):
            return end, False
        # Tokenizers with byte fallback write a replacement character for each byte, others one for all.
        return end - (1 if len(finished) + 1 == len(self._tail) else len(unfinished)), True

    def append(self, token_id: int) -> str:
        """Add one token and return the text that it settles: usually its own text, sometimes more, sometimes none."""
        if self._vocabulary.is_special(token_id):
            return ""
        self._held.append(token_id)
        self._tail = self._decode_held(self._held)
        if not self._tail.endswith(REPLACEMENT):
            return self.flush()
        return self._settle_front() if len(self._held) > _MAX_HELD else ""

    def flush(self) -> str:
        """Settle all text, because no further token follows, and return the part that was not settled before."""
        return self._settle(len(self._held), self._tail)

    def _decode_held(self, held: list[int]) -> str:
        text = self._vocabulary.decode(self._context + held)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # If one byte is wrong, byte-fallback decoders replace the whole run of bytes, including settled ones.
        return self._vocabulary.decode(held)

    def _settle_front(self) -> str:
        """Settle all but the last tokens of a long run of broken characters, if decoding in two parts changes no text."""
        cut = len(self._held) - _MAX_INCOMPLETE
        front = self._decode_held(self._held[:cut])
        if front + self._vocabulary.decode(self._held[cut:]) != self._tail:
            return ""
        return self._settle(cut, front)

    def _settle(self, num_tokens: int, text: str) -> str:
        settled, self._held = self._held[:num_tokens], self._held[num_tokens:]
        self._settled.append(text)
        self._num_settled += len(text)
        self._tail = self._tail[len(text) :]
        # Tokens without text (a lone space at the start of a text) need the tokens before them as context too.
        has_text = bool(self._vocabulary.decode(settled))
        self._context = settled if has_text else _plain_context(self._vocabulary, self._context + settled)
        self._context_text = self._vocabulary.decode(self._context)
        return text


def _goes_on(unfinished: bytes, piece: bytes) -> bool:
    """Return whether bytes belong to the unfinished character before them."""
    try:
        getincrementaldecoder("utf-8")().decode(unfinished + piece[:1])
    except UnicodeDecodeError:
        return False
    return bool(unfinished)


def token_texts(vocabulary: Vocabulary, token_ids: Sequence[int], context_ids: Sequence[int] = ()) -> list[str]:
    r"""Return one string for each token; joined, they are the decoded text.

    A token that is part of a character is written ``bytes:\xe2\x80`` (HELM's convention), and a special token as its literal
    text. If a tokenizer's tokens cannot be decoded one by one, the last token of a character gets the whole character.

    Args:
        vocabulary: The tokenizer's vocabulary.
        token_ids: The tokens.
        context_ids: The tokens before them. If there are none, the tokens are decoded as the start of a text.
    """
    texts = [vocabulary.text(token_id) for token_id in token_ids]
    num_leading = next((index for index, token_id in enumerate(token_ids) if not vocabulary.is_special(token_id)), len(texts))
    if num_leading == len(texts):
        return texts
    if num_leading and not context_ids:
        # After a BOS token, a text starts.
        return texts[:num_leading] + token_texts(vocabulary, token_ids[num_leading:])
    whole = _decode_behind(vocabulary, token_ids, context_ids)
    joined = b"".join(vocabulary.piece(token_id) for token_id in token_ids).decode(errors="replace")
    # Decoders differ in how they write broken bytes, so the bytes of each token are returned.
    if whole == joined or (REPLACEMENT in whole and REPLACEMENT in joined):
        return texts
    first = next((index for index, text in enumerate(texts) if text), 0)
    if joined == " " + whole and texts[first].startswith(" "):
        texts[first] = texts[first][1:]
        return texts
    return _windowed_texts(vocabulary, token_ids, context_ids)


def _windowed_texts(vocabulary: Vocabulary, token_ids: Sequence[int], context_ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(vocabulary, context_ids)
    texts = [
        vocabulary.text(token_id) if vocabulary.is_special(token_id) else detokenizer.append(token_id) for token_id in token_ids
    ]
    texts[-1] += detokenizer.flush()
    return texts


def _decode_behind(vocabulary: Vocabulary, token_ids: Sequence[int], context_ids: Sequence[int]) -> str:
    context = _plain_context(vocabulary, context_ids)
    before, text = vocabulary.decode(context), vocabulary.decode([*context, *token_ids])
    return text[len(before) :] if text.startswith(before) else vocabulary.decode(token_ids)


def _plain_context(vocabulary: Vocabulary, token_ids: Sequence[int]) -> list[int]:
    """Return the shortest suffix of plain tokens that has text and begins and ends with whole characters."""
    plain = [token_id for token_id in token_ids[-4 * _MAX_CONTEXT :] if not vocabulary.is_special(token_id)]
    for length in range(1, min(len(plain), _MAX_CONTEXT) + 1):
        text = vocabulary.decode(plain[-length:])
        if text and REPLACEMENT not in text:
            return plain[-length:]
    return plain[-_MAX_CONTEXT:]
