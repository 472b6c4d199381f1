"""How many bits a model needs for each byte of any documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from helm.benchmark.presentation.taxonomy_info import TaxonomyInfo
from helm.benchmark.scenarios.scenario import TEST_SPLIT, Input, Instance, Scenario, ScenarioMetadata

from flexgen_helm.errors import ScenarioError
from flexgen_helm.scenarios.texts import Source, read_texts


class PerplexityScenario(Scenario):
    """Each document is an instance; HELM's language modeling adapter cuts it into windows of the model's context."""

    name = "perplexity"
    description = "Perplexity and bits per byte of documents"
    tags = ["language_modeling"]  # noqa: RUF012  HELM declares it as a field

    def __init__(
        self,
        path: str,
        config: str | None = None,
        split: str | None = None,
        field: str | None = None,
        piece_bytes: int | None = None,
    ) -> None:
        """Args: piece_bytes: see ``cut``; None: each document is one instance. The others are as in ``Source``."""
        super().__init__()
        self._source = Source(path, config, split, field)
        self._piece_bytes = None if piece_bytes is None else checked_bytes(piece_bytes)

    def get_instances(self, output_path: str) -> list[Instance]:
        """Return the documents, or their pieces, but those that are empty or white space.

        Args:
            output_path: Folder of the scenario, where a relative path is looked up unless the working directory has it.

        Raises:
            ScenarioError: The documents cannot be read, or all of them are empty.
        """
        documents = read_texts(self._source, Path(output_path))
        if self._piece_bytes is not None:
            documents = [piece for document in documents for piece in cut(document, self._piece_bytes)]
        return [Instance(Input(text=document), references=[], split=TEST_SPLIT) for document in documents]

    def get_metadata(self) -> ScenarioMetadata:
        """Return what helm-summarize shows."""
        return ScenarioMetadata(
            name="perplexity",
            main_metric="bits_per_byte",
            main_split=TEST_SPLIT,
            display_name="Perplexity of documents",
            short_display_name="Perplexity",
            description="Bits that the model needs for each byte of UTF-8 text.",
            taxonomy=TaxonomyInfo(task="language modeling"),
        )


def cut(document: str, most: int) -> Iterator[str]:
    """Cut a document before white space into pieces that are together the document.

    Args:
        document: Any text; white space at its end is left out.
        most: Bytes of UTF-8 of a piece. A word that has more is a piece of its own.
    """
    piece, size = "", 0
    for word in re.findall(r"\s*\S+", document):
        length = len(word.encode(errors="replace"))
        if piece and size + length > most:
            yield piece
            piece, size = "", 0
        piece, size = piece + word, size + length
    if piece:
        yield piece


def checked_bytes(piece_bytes: object) -> int:
    """Return the bytes of a piece.

    Raises:
        ScenarioError: They are no whole number of at least 1.
    """
    if not isinstance(piece_bytes, int) or piece_bytes < 1:
        raise ScenarioError(
            f"`piece_bytes={piece_bytes}` is no number of bytes. Write a whole number, such as piece_bytes=2000."
        )
    return piece_bytes
