"""How many bits a model needs for each byte of any documents."""

from __future__ import annotations

from pathlib import Path

from helm.benchmark.presentation.taxonomy_info import TaxonomyInfo
from helm.benchmark.scenarios.scenario import TEST_SPLIT, Input, Instance, Scenario, ScenarioMetadata

from flexgen_helm.scenarios.texts import Source, read_texts


class PerplexityScenario(Scenario):
    """Each document is an instance; HELM's language modeling adapter cuts it into windows of the model's context."""

    name = "perplexity"
    description = "Perplexity and bits per byte of documents"
    tags = ["language_modeling"]  # noqa: RUF012  HELM declares it as a field

    def __init__(self, path: str, config: str | None = None, split: str | None = None, field: str | None = None) -> None:
        """Args: as in ``Source``."""
        super().__init__()
        self._source = Source(path, config, split, field)

    def get_instances(self, output_path: str) -> list[Instance]:
        """Return the documents but those that are empty or white space.

        Args:
            output_path: Folder of the scenario, where a relative path is looked up unless the working directory has it.

        Raises:
            ScenarioError: The documents cannot be read, or all of them are empty.
        """
        documents = read_texts(self._source, Path(output_path))
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
