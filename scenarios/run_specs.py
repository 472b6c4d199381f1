"""Run entries of ours. HELM loads this module through the plugin, so it imports neither torch nor ``datasets``.

HELM splits a run entry at each comma and takes what looks like a number for a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from helm.benchmark.adaptation.adapter_spec import ADAPT_MULTIPLE_CHOICE_SEPARATE_ORIGINAL
from helm.benchmark.adaptation.common_adapter_specs import (
    get_completion_adapter_spec,
    get_language_modeling_adapter_spec,
    get_multiple_choice_separate_adapter_spec,
)
from helm.benchmark.metrics.common_metric_specs import (
    get_basic_generation_metric_specs,
    get_exact_match_metric_specs,
    get_generic_metric_specs,
    get_language_modeling_metric_specs,
)
from helm.benchmark.metrics.metric import MetricSpec
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import ScenarioSpec

from flexgen_helm.scenarios.lambada import GROUPS, LambadaScenario
from flexgen_helm.scenarios.perplexity import checked_bytes
from flexgen_helm.scenarios.texts import Source

MAX_WORD_TOKENS = 8
"""Room for the word and what shows that it ends. SmolLM2 writes no last word of LAMBADA with more than 6 tokens."""


@run_spec_function("lambada")
def get_lambada_spec(
    task: str = "accuracy", path: str | None = None, config: str | None = None, split: str | None = None
) -> RunSpec:
    """Return the spec of LAMBADA: the last word of a passage, generated or scored.

    Args:
        task: ``accuracy`` of the word that is generated greedily, or ``perplexity`` of the right one.
        path: Other passages than the test set, which is the converted file or, without it, the hub's; see ``Source``.
        config: See ``Source``.
        split: See ``Source``.

    Raises:
        ScenarioError: There is no such task, or an argument is a number.
    """
    arguments = _given(task=task, path=path, config=config, split=split)
    LambadaScenario(**arguments)  # wrong arguments are refused before anything runs
    if task == "accuracy":
        adapter_spec = get_completion_adapter_spec(max_tokens=MAX_WORD_TOKENS, stop_sequences=["\n"])
        metric_specs = [
            MetricSpec("flexgen_helm.scenarios.last_word.LastWordAccuracy"),
            *get_basic_generation_metric_specs(["prefix_exact_match"]),
        ]
    else:
        adapter_spec = get_multiple_choice_separate_adapter_spec(ADAPT_MULTIPLE_CHOICE_SEPARATE_ORIGINAL)
        metric_specs = [MetricSpec("flexgen_helm.scenarios.last_word.LastWordPerplexity")]
    return RunSpec(
        name=_name("lambada", arguments),
        scenario_spec=ScenarioSpec("flexgen_helm.scenarios.lambada.LambadaScenario", arguments),
        adapter_spec=adapter_spec,
        metric_specs=[*metric_specs, *get_generic_metric_specs()],
        groups=[GROUPS[task]],
    )


@run_spec_function("arc_easy")
def get_arc_easy_spec() -> RunSpec:
    """Return the spec of ARC-Easy: every answer scored behind the question, without examples."""
    adapter_spec = get_multiple_choice_separate_adapter_spec(ADAPT_MULTIPLE_CHOICE_SEPARATE_ORIGINAL)
    return RunSpec(
        name="arc_easy",
        scenario_spec=ScenarioSpec("flexgen_helm.scenarios.arc_easy.ArcEasyScenario", {}),
        adapter_spec=replace(adapter_spec, input_prefix="Question: ", output_prefix="\nAnswer: "),
        metric_specs=get_exact_match_metric_specs(),
        groups=["arc_easy"],
    )


@run_spec_function("perplexity")
def get_perplexity_spec(
    path: str, config: str | None = None, split: str | None = None, field: str | None = None, piece_bytes: int | None = None
) -> RunSpec:
    """Return the spec of the perplexity of documents, in the windows of HELM's language modeling adapter.

    Args:
        path: A text file, a folder of files, a file of rows (JSON, JSON lines, CSV, Parquet) or the name of a data set on
            the hub; relative to the working directory or to ``<output path>/scenarios/perplexity``.
        config: See ``Source``.
        split: See ``Source``.
        field: See ``Source``.
        piece_bytes: Cuts documents into instances of at most so many bytes. Such a run is also in the group
            ``perplexity_<piece_bytes>_bytes``, so that a schema can show it apart.

    Raises:
        ScenarioError: A text is a number, or the bytes are none.
    """
    arguments = _given(path=path, config=config, split=split, field=field)
    Source(**arguments)  # wrong arguments are refused before anything runs
    pieces = {} if piece_bytes is None else {"piece_bytes": checked_bytes(piece_bytes)}
    return RunSpec(
        name=_name("perplexity", {**arguments, **pieces}),
        scenario_spec=ScenarioSpec("flexgen_helm.scenarios.perplexity.PerplexityScenario", {**arguments, **pieces}),
        adapter_spec=get_language_modeling_adapter_spec(),
        metric_specs=get_language_modeling_metric_specs([]),
        groups=["perplexity", *(f"perplexity_{number}_bytes" for number in pieces.values())],
    )


def _given(**arguments: str | None) -> dict[str, str]:
    return {name: value for name, value in arguments.items() if value is not None}


def _name(scenario: str, arguments: Mapping[str, str | int]) -> str:
    return f"{scenario}:{','.join(f'{name}={value}' for name, value in arguments.items())}"
