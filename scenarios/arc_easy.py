"""ARC-Easy (Clark et al., 2018, arXiv:1803.05457): science questions of schools with three to five answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helm.benchmark.presentation.taxonomy_info import TaxonomyInfo
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    VALID_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioMetadata,
)

from flexgen_helm.errors import ScenarioError

FILE = "arc_easy_validation.jsonl"
"""The validation split, rows as on the hub (``allenai/ai2_arc``), in the folder of the scenario."""


class ArcEasyScenario(Scenario):
    """Questions of the validation split; the answers are the references."""

    name = "arc_easy"
    description = "Science questions of schools (Clark et al., 2018)"
    tags = ["knowledge", "multiple_choice"]  # noqa: RUF012  HELM declares it as a field

    def get_instances(self, output_path: str) -> list[Instance]:
        """Return the questions.

        Args:
            output_path: Folder of the scenario, which holds `FILE`.

        Raises:
            ScenarioError: The file is missing or is not as on the hub.
        """
        file = Path(output_path) / FILE
        try:
            return [_make_instance(json.loads(line)) for line in file.read_text(encoding="utf-8").split("\n") if line]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ScenarioError(
                f"{file} cannot be read as questions of ARC ({type(error).__name__}: {error}). `python -m flexgen_helm.assets "
                "--output-path <HELM's output path>` fetches it."
            ) from error

    def get_metadata(self) -> ScenarioMetadata:
        """Return what helm-summarize shows."""
        return ScenarioMetadata(
            name="arc_easy",
            main_metric="exact_match",
            main_split=VALID_SPLIT,
            display_name="ARC-Easy",
            description="Science questions of schools [(Clark et al., 2018)](https://arxiv.org/abs/1803.05457).",
            taxonomy=TaxonomyInfo(task="question answering", what="science", when="before 2018", language="English"),
        )


def _make_instance(row: dict[str, Any]) -> Instance:
    answers = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    if row["answerKey"] not in answers:
        raise ValueError(f"the question {row['question']!r} has no answer {row['answerKey']!r}")
    references = [
        Reference(Output(text=text), tags=[CORRECT_TAG] if label == row["answerKey"] else []) for label, text in answers.items()
    ]
    return Instance(Input(text=row["question"]), references=references, split=VALID_SPLIT)
