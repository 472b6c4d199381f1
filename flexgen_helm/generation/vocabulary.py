"""What each token of a tokenizer stands for, learned through its public methods and remembered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no UTF-8 character (yet)."""

_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """The tokens of one tokenizer. Made once for each loaded model; it remembers every token that it has seen.

    Works for byte-level, byte-fallback and WordPiece-like tokenizers, fast and slow ones. Texts are never cleaned up
    (``clean_up_tokenization_spaces`` would remove spaces that the model did write).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap ``tokenizer``."""
        self.tokenizer = tokenizer
        self._pieces: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ``token_ids``, special tokens included as their literal text."""
        end = self._num_tokens
        known = [token_id for token_id in token_ids if 0 <= token_id < end]
        text = self.tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def is_special(self, token_id: int) -> bool:
        """Whether the token adds nothing to a text: a special token, or an id behind the tokenizer's last one.

        Models often have a few more output rows than their tokenizer has tokens.
        """
        return token_id in self._special_ids or self._is_unknown(token_id)

    def piece(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that the token adds behind other text, for a special token its literal text."""
        if token_id not in self._pieces:
            self._pieces[token_id] = self._find_piece(token_id)
        return self._pieces[token_id]

    def text(self, token_id: int) -> str:
        r"""Return the token's own text; one that holds part of a character is ``bytes:\xe2\x80``, as HELM writes it.

        HELM counts the bytes of such a token by its ``\x`` (helm.benchmark.metrics.basic_metrics.get_num_bytes), so
        all its bytes are written that way. So is a token whose text itself begins with ``bytes:``.
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
        """Some plain token and its text: a token's piece is what it adds behind this one."""
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
        """Return the bytes behind a token's name in the two notations in use, or None."""
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
