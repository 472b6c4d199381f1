"""XSum scored by ROUGE alone. HELM's own run specs also load models that judge summaries, from the hub."""

from __future__ import annotations

from helm.benchmark.adaptation.common_adapter_specs import get_summarization_adapter_spec
from helm.benchmark.metrics.common_metric_specs import get_basic_metric_specs
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import ScenarioSpec


@run_spec_function("xsum_rouge")
def get_xsum_rouge_spec(temperature: float = 0.3) -> RunSpec:
    """Return HELM's ``summarization_xsum_sampled`` with ROUGE-1, ROUGE-2 and ROUGE-L as its only metrics.

    Args:
        temperature: Sampling temperature of the one summary of each article.
    """
    scenario = ScenarioSpec(
        "helm.benchmark.scenarios.summarization_scenario.SummarizationScenario",
        {"dataset_name": "xsum-sampled", "sampling_min_length": 50, "sampling_max_length": 150, "doc_max_length": 512},
    )
    return RunSpec(
        name=f"xsum_rouge:temperature={temperature}",
        scenario_spec=scenario,
        adapter_spec=get_summarization_adapter_spec(num_sents=1, max_tokens=64, temperature=temperature),
        metric_specs=get_basic_metric_specs(["rouge_1", "rouge_2", "rouge_l"]),
        groups=["summarization_xsum_sampled"],
    )
