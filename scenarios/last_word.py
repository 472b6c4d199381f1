"""Accuracy and perplexity of the word that ends a passage."""

from __future__ import annotations

import dataclasses
import math
import re

from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.metrics.basic_metrics import compute_request_state_metrics, get_request_state_metrics_metadata
from helm.benchmark.metrics.efficiency_metrics import EfficiencyMetric
from helm.benchmark.metrics.metric import Metric, MetricMetadata, MetricResult
from helm.benchmark.metrics.metric_name import MetricName
from helm.benchmark.metrics.metric_service import MetricService
from helm.benchmark.metrics.reference_metric import ReferenceMetric
from helm.benchmark.metrics.statistic import Stat
from helm.benchmark.window_services.window_service import WindowService
from helm.benchmark.window_services.window_service_factory import WindowServiceFactory
from helm.common.request import GeneratedOutput

from flexgen_helm.errors import ScenarioError

ACCURACY = "last_word_accuracy"
LOGPROB = "last_word_logprob"
PERPLEXITY = "last_word_perplexity"


class LastWordAccuracy(Metric):
    """Whether the first word of a greedy answer is the reference.

    The usual definition, that each token of the reference is the most probable one, asks only for the beginning of the
    answer: there "sign" is right where the model writes "signs" with the tokens "sign" and "s".
    """

    def evaluate_generation(
        self, adapter_spec: AdapterSpec, request_state: RequestState, metric_service: MetricService, eval_cache_path: str
    ) -> list[Stat]:
        """Return 1 or 0 for one answer."""
        (reference,) = request_state.instance.references
        return [Stat(MetricName(ACCURACY)).add(begins_with_word(_completion(request_state).text, reference.output.text))]

    def get_metadata(self) -> list[MetricMetadata]:
        """Return what helm-summarize shows."""
        return [
            MetricMetadata(
                ACCURACY,
                display_name="Accuracy of the last word",
                short_display_name="Accuracy",
                description="Share of passages after which the first generated word is the right one.",
                lower_is_better=False,
                group="accuracy",
            )
        ]


def begins_with_word(answer: str, word: str) -> bool:
    """Return whether the answer, but for white space before it, begins with the word and the word ends there."""
    return re.match(rf"\s*{re.escape(word)}(?!\w)", answer) is not None


class LastWordPerplexity(ReferenceMetric):
    """Log-probability of the one reference behind its passage, in nats, and ``exp(-mean)`` of it: perplexity per word."""

    def evaluate(
        self, scenario_state: ScenarioState, metric_service: MetricService, eval_cache_path: str, parallelism: int
    ) -> MetricResult:
        """Return the statistics of all passages, with the perplexity, which is no mean of those of single ones."""
        result = super().evaluate(scenario_state, metric_service, eval_cache_path, parallelism)
        for stat in [stat for stat in result.aggregated_stats if stat.name.name == LOGPROB]:
            name = dataclasses.replace(stat.name, name=PERPLEXITY)
            result.aggregated_stats.append(Stat(name).add(math.exp(-stat.sum / stat.count)))
        return result

    def evaluate_references(
        self,
        adapter_spec: AdapterSpec,
        reference_request_states: list[RequestState],
        metric_service: MetricService,
        eval_cache_path: str,
    ) -> list[Stat]:
        """Return the log-probability of one reference and HELM's statistics of its request.

        Raises:
            ScenarioError: The passage has been cut to the model's context, and its last word with it; or the tokenizer does not
                tell the word from the passage.
        """
        (state,) = reference_request_states
        if state.prompt_truncated:
            raise ScenarioError(
                f"Instance {state.instance.id} is longer than the context of {adapter_spec.model_deployment}, so its last word "
                "cannot be scored. Choose a model with a longer context or shorter passages."
            )
        window = WindowServiceFactory.get_window_service(adapter_spec.model_deployment, metric_service)
        num_tokens = _num_word_tokens(window, state)
        logprob = sum(token.logprob for token in _completion(state).tokens[-num_tokens:])
        return [
            Stat(MetricName(LOGPROB)).add(logprob),
            *compute_request_state_metrics(EfficiencyMetric(), adapter_spec, state, metric_service),
        ]

    def get_metadata(self) -> list[MetricMetadata]:
        """Return what helm-summarize shows."""
        return [
            MetricMetadata(
                PERPLEXITY,
                display_name="Perplexity of the last word",
                short_display_name="Perplexity",
                description="Inverse of the geometric mean of the probabilities of the last words.",
                lower_is_better=True,
                group="perplexity",
            ),
            MetricMetadata(
                LOGPROB,
                display_name="Log-probability of the last word",
                short_display_name="Logprob",
                description="Natural logarithm of the probability of all its tokens.",
                lower_is_better=False,
            ),
            *get_request_state_metrics_metadata(EfficiencyMetric()),
        ]


def _num_word_tokens(window: WindowService, state: RequestState) -> int:
    """Return how many tokens of the prompt are the word's: those behind all tokens of the passage.

    Raises:
        ScenarioError: The prompt does not begin with the tokens of the passage, or none follows.
    """
    passage = window.encode(state.instance.input.text).token_values
    prompt = window.encode(state.request.prompt).token_values
    if prompt[: len(passage)] != passage or len(prompt) == len(passage):
        (reference,) = state.instance.references
        raise ScenarioError(
            f"The last word of instance {state.instance.id} ({reference.output.text!r}) cannot be scored: the tokenizer of "
            f"{state.request.model_deployment} joins it with the end of the passage ({state.instance.input.text[-20:]!r}), so "
            "no token begins where the word does. Correct or remove the passage, or choose a model with another tokenizer."
        )
    return len(prompt) - len(passage)


def _completion(state: RequestState) -> GeneratedOutput:
    assert state.result is not None
    return state.result.completions[0]
