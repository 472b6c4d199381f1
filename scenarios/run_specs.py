"""Run entries of ours. HELM loads this module through the plugin, so it imports neither torch nor data.

HELM splits a run entry at each comma and reads what looks like a number as a number.
"""

from __future__ import annotations

from helm.benchmark.adaptation.adapter_spec import ADAPT_MULTIPLE_CHOICE_SEPARATE_ORIGINAL, AdapterSpec
from helm.benchmark.adaptation.common_adapter_specs import (
    get_completion_adapter_spec,
    get_language_modeling_adapter_spec,
    get_multiple_choice_separate_adapter_spec,
)
from helm.benchmark.metrics.common_metric_specs import (
    get_basic_metric_specs,
    get_basic_reference_metric_specs,
    get_generic_metric_specs,
    get_language_modeling_metric_specs,
)
from helm.benchmark.metrics.metric import MetricSpec
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import ScenarioSpec

from flexgen_helm.errors import ScenarioError

LAMBADA_TASKS = ("accuracy", "perplexity")


@run_spec_function("lambada")
def get_lambada_spec(task: str = "accuracy", max_tokens: int = 8, **source: str) -> RunSpec:
    """Return the spec of LAMBADA: the last word of a passage, generated (accuracy) or scored (perplexity).

    Args:
        task: ``accuracy`` or ``perplexity``.
        max_tokens: Room for the generated word, in tokens.
        source: ``path``, ``config``, ``split`` and ``field`` as in ``Source``. Without ``path``: the converted file of
            ``python -m flexgen_helm.assets --output-path``, or else the hub's.

    Raises:
        ScenarioError: There is no such task.
    """
    if task not in LAMBADA_TASKS:
        raise ScenarioError(f"`lambada:task={task}` is unknown. Write one of {', '.join(LAMBADA_TASKS)}.")
    adapter: AdapterSpec
    if task == "accuracy":
        adapter = get_completion_adapter_spec(max_tokens=max_tokens, stop_sequences=["\n"])
        metrics = [
            MetricSpec("flexgen_helm.scenarios.last_word.LastWordAccuracy"),
            *get_basic_metric_specs(["prefix_exact_match"]),
        ]
    else:
        adapter = get_multiple_choice_separate_adapter_spec(ADAPT_MULTIPLE_CHOICE_SEPARATE_ORIGINAL)
        metrics = [
            MetricSpec("flexgen_helm.scenarios.last_word.LastWordPerplexity"),
            *get_basic_reference_metric_specs(),
            *get_generic_metric_specs(),
        ]
    arguments = {"task": task, **source}
    return RunSpec(
        name=_name("lambada", arguments),
        scenario_spec=ScenarioSpec("flexgen_helm.scenarios.lambada.LambadaScenario", arguments),
        adapter_spec=adapter,
        metric_specs=metrics,
        groups=["lambada" if task == "accuracy" else "lambada_perplexity"],
    )


@run_spec_function("perplexity")
def get_perplexity_spec(path: str, **source: str) -> RunSpec:
    """Return the spec of the perplexity of documents, in the windows of HELM's language modelling.

    Args:
        path: A text file, a folder of files, a file of rows (JSON, JSON lines, CSV, Parquet) or a data set's name on the hub.
            A relative path is looked up in the working directory, then in ``<output path>/scenarios/perplexity``.
        source: ``config``, ``split`` and ``field`` as in ``Source``.
    """
    arguments = {"path": path, **source}
    return RunSpec(
        name=_name("perplexity", arguments),
        scenario_spec=ScenarioSpec("flexgen_helm.scenarios.perplexity.PerplexityScenario", arguments),
        adapter_spec=get_language_modeling_adapter_spec(),
        metric_specs=get_language_modeling_metric_specs([]),
        groups=["perplexity"],
    )


def _name(scenario: str, arguments: dict[str, str]) -> str:
    return f"{scenario}:{','.join(f'{name}={value}' for name, value in arguments.items())}"
