"""Find the text and bytes of each token of a tokenizer, through the tokenizer's public methods."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT = "\ufffd"
"""The character that decoders write for bytes that are not, or not yet, a character in UTF-8."""

_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """Texts and bytes of the tokens of one tokenizer, remembered once they were computed. Made once for each loaded model.

    It works for byte-level, byte-fallback and WordPiece-like tokenizers, fast and slow ones. Texts are never cleaned up: the
    tokenizer's option for that would remove spaces that the model generated.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap a tokenizer, which must not change afterwards."""
        self.tokenizer = tokenizer
        self._pieces: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ``token_ids``, with special tokens as their literal text. Unknown ids add no text."""
        end = self._num_tokens
        known = [token_id for token_id in token_ids if 0 <= token_id < end]
        text = self.tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def is_special(self, token_id: int) -> bool:
        """Return whether a token adds no text: it is a special token, or its id is greater than the tokenizer's last.

        Models often have logits for a few more ids than their tokenizer has tokens.
        """
        return token_id in self._special_ids or self._is_unknown(token_id)

    def piece(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token adds after other text. A special token gives its literal text."""
        if token_id not in self._pieces:
            self._pieces[token_id] = self._find_piece(token_id)
        return self._pieces[token_id]

    def text(self, token_id: int) -> str:
        r"""Return the text of a token. A token that is part of a character is written ``bytes:\xe2\x80``, as in HELM.

        HELM counts the bytes of such a token by its ``\x`` (helm.benchmark.metrics.basic_metrics.get_num_bytes), so all its
        bytes are written that way. A token whose text itself begins with ``bytes:`` is written in the same way.
        """
        if token_id not in self._texts:
            self._texts[token_id] = _text_of(self.piece(token_id))
        return self._texts[token_id]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(self.tokenizer.all_special_ids) | {token_id for token_id, token in added if token.special}

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """A plain token and its text. The piece of a token is the text that it adds after this one."""
        token_ids = self.tokenizer.encode("a", add_special_tokens=False)[-1:]
        return token_ids, self.decode(token_ids)

    @cached_property
    def _byte_alphabet(self) -> dict[str, int]:
        return {character: byte for byte, character in bytes_to_unicode().items()}

    def _is_unknown(self, token_id: int) -> bool:
        return not 0 <= token_id < self._num_tokens

    @cached_property
    def _num_tokens(self) -> int:
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1

    def _find_piece(self, token_id: int) -> bytes:
        name = self.tokenizer.convert_ids_to_tokens(token_id) if not self._is_unknown(token_id) else None
        if name is None:
            return b""
        assert isinstance(name, str)
        if token_id in self._special_ids:
            return name.encode()
        anchor_ids, anchor_text = self._anchor
        text = self.decode([*anchor_ids, token_id])
        text = text[len(anchor_text) :] if text.startswith(anchor_text) else self.decode([token_id])
        if REPLACEMENT not in text:
            return text.encode()
        raw = self._raw_bytes(name)
        return raw if raw is not None and raw.decode(errors="replace") == text else text.encode()

    def _raw_bytes(self, name: str) -> bytes | None:
        """Return the bytes that a token's name stands for, in byte-fallback or byte-level notation; None if in neither."""
        fallback = _FALLBACK_BYTE.fullmatch(name)
        if fallback:
            return bytes([int(fallback[1], 16)])
        if all(character in self._byte_alphabet for character in name):
            return bytes(self._byte_alphabet[character] for character in name)
        return None


def _text_of(piece: bytes) -> str:
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        text = None
    if text is None or text.startswith("bytes:"):
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
    return text
