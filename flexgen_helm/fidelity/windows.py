"""Texts and jobs as windows of tokens that both models read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from flexgen_helm.errors import InvalidJob
from flexgen_helm.generation.prepare import added_prefix

JOB_FIELDS = ("prompt", "token_ids")


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a document, which a model reads without what is before them."""

    tokens: tuple[int, ...]
    first: int
    """Index of the first token whose prediction counts; those before it are context. At least 1."""
    group: int
    """Number of what is drawn as a whole when the bootstrap resamples."""

    @property
    def targets(self) -> tuple[int, ...]:
        """The tokens whose predictions are compared."""
        return self.tokens[self.first :]


@dataclass(frozen=True)
class Windows:
    """All windows of a comparison."""

    windows: tuple[Window, ...]
    num_bytes: int | None
    """Bytes of UTF-8 of the tokens whose predictions count; None: unknown, because there is no tokenizer."""
    groups: Literal["windows", "jobs"]
    """What a group is: the windows of one text, or all windows of a job."""
    source: str
    """Name of the file."""
    length: int
    """Most tokens of a window."""

    @property
    def num_positions(self) -> int:
        """Predictions that count."""
        return sum(len(window.targets) for window in self.windows)

    @property
    def digest(self) -> str:
        """SHA-256 of all windows."""
        plain = [(window.tokens, window.first, window.group) for window in self.windows]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


@dataclass(frozen=True)
class Reader:
    """How files become windows.

    A text is tokenised without special tokens, and the tokens that the tokenizer adds before a text are put before each window.
    If there are none, a window begins with the last token of the window before. So every token counts once, but a first token
    that nothing precedes.
    """

    tokenizer: PreTrainedTokenizerBase | None
    length: int
    """Tokens of a window, context included; at least 2."""
    max_tokens: int | None = None
    """Most tokens of all texts together; None: all of them."""

    def text(self, file: Path) -> Windows:
        """Return the windows of a text file, each of them a group.

        Raises:
            InvalidJob: If the file cannot be read, or has less text than a window.
        """
        tokens, num_bytes, prefix = self._tokenised(_content(file), f"the text {file}")
        if len(prefix) + len(tokens) < self.length:
            raise InvalidJob(
                f"The text {file} has {len(tokens)} tokens, which is less than a window of {self.length}. Give a longer text, "
                "or a shorter --window."
            )
        windows = [Window(each, first, group) for group, (each, first) in enumerate(self._cut(tokens, prefix))]
        return Windows(tuple(windows), num_bytes, "windows", file.name, self.length)

    def jobs(self, file: Path) -> Windows:
        """Return the windows of a file of jobs, each job a group: lines of JSON with ``prompt`` or ``token_ids``.

        Raises:
            InvalidJob: If the file cannot be read, holds no job, or a job has fewer than two tokens.
        """
        windows: list[Window] = []
        counts: list[int | None] = []
        left = self.max_tokens
        for number, line in enumerate(_content(file).splitlines(), start=1):
            if not line.strip() or left == 0:
                continue
            tokens, num_bytes, prefix = self._job(line, f"line {number} of {file}", left)
            left = None if left is None else left - len(tokens)
            windows += [Window(each, first, len(counts)) for each, first in self._cut(tokens, prefix)]
            counts.append(num_bytes)
        total = sum(count or 0 for count in counts)
        return Windows(tuple(windows), None if None in counts else total, "jobs", file.name, self.length)

    def _job(self, line: str, where: str, most: int | None) -> tuple[tuple[int, ...], int | None, tuple[int, ...]]:
        try:
            fields = json.loads(line)
            given = fields if isinstance(fields, dict) else {}
        except json.JSONDecodeError as error:
            raise InvalidJob(f"The job in {where} is no JSON ({error}). Give one object in each line.") from None
        if len(given) != 1 or not set(given) <= set(JOB_FIELDS):
            raise InvalidJob(f"The job in {where} is no object with the one field prompt or token_ids. Give one of them.")
        if "prompt" in given:
            tokens, num_bytes, prefix = self._tokenised(str(given["prompt"]), where, most)
        else:
            tokens, prefix = _token_ids(given["token_ids"], where)[:most], ()
            num_bytes = self._bytes(tokens[1:])
        if len(prefix) + len(tokens) < 2:
            raise InvalidJob(f"The job in {where} has fewer than two tokens, so nothing is predicted. Leave it out.")
        return tokens, num_bytes, prefix

    def _tokenised(self, text: str, where: str, most: int | None = None) -> tuple[tuple[int, ...], int | None, tuple[int, ...]]:
        """Return a text's tokens, the bytes of those that are predicted, and the tokens before each window."""
        if self.tokenizer is None:
            raise InvalidJob(
                "The model folder has no tokenizer to read text with. Add the tokenizer's files, or give --jobs with token_ids."
            )
        most = self.max_tokens if most is None else most
        tokens = tuple(self.tokenizer.encode(text, add_special_tokens=False, truncation=False, verbose=False))
        prefix = added_prefix(self.tokenizer)
        if not tokens:
            raise InvalidJob(f"There are no tokens in {where}. Give some text.")
        if most is not None and len(tokens) > most:
            tokens = tokens[:most]
            return tokens, self._bytes(tokens if prefix else tokens[1:]), prefix
        unpredicted = 0 if prefix else self._bytes(tokens[:1]) or 0
        return tokens, len(text.encode()) - unpredicted, prefix

    def _bytes(self, tokens: Sequence[int]) -> int | None:
        if self.tokenizer is None:
            return None
        return len(str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)).encode())

    def _cut(self, tokens: tuple[int, ...], prefix: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], int]]:
        """Yield the tokens of each window and the index of its first predicted token."""
        size = self.length - (len(prefix) or 1)
        if size < 1:
            raise InvalidJob(f"A window of {self.length} tokens has no room beside those that the tokenizer adds. Lengthen it.")
        if prefix:
            for i in range(0, len(tokens), size):
                yield prefix + tokens[i : i + size], len(prefix)
        else:
            for i in range(1, len(tokens), size):
                yield tokens[i - 1 : i + size], 1


def _token_ids(given: object, where: str) -> tuple[int, ...]:
    if not isinstance(given, list) or not all(isinstance(token, int) and not isinstance(token, bool) for token in given):
        raise InvalidJob(f"token_ids in {where} are no list of integers. Give token ids, such as [1, 529, 13].")
    return tuple(given)


def _content(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidJob(f"The file {file} cannot be read ({error}). Give a file of UTF-8 text.") from None
    if not text.strip():
        raise InvalidJob(f"The file {file} is empty, so there is nothing to compare the models on. Give UTF-8 text.")
    return text
