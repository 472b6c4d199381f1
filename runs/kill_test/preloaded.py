"""What commands have in common, done once in the process from which they are forked.

It takes ten seconds of each ``helm-run``, in which there is nothing to lose: HELM's imports, and its own configuration.
"""

from __future__ import annotations

import importlib

from helm.benchmark.config_registry import register_builtin_configs_from_helm_package
from helm.benchmark.model_metadata_registry import get_all_models
from helm.benchmark.run_spec import discover_run_spec_functions

BUILT_IN = "simple/model1"
"""A model of HELM's own configuration."""
MODULES = (
    "flexgen_helm.helm.runner",
    "flexgen_helm.helm.tokenizer",
    "flexgen_helm.runtime.engine",
    "helm.benchmark.metrics.basic_metrics",
    "helm.benchmark.run",
    "helm.benchmark.scenarios.custom_mcqa_scenario",
    "helm.benchmark.scenarios.wikifact_scenario",
    "transformers.models.llama.modeling_llama",
)
"""Imported by name, as HELM does. Not our plugin: it completes the deployments that HELM has read before."""


def prepare() -> None:
    """Import modules and read HELM's configuration."""
    for name in MODULES:
        importlib.import_module(name)
    discover_run_spec_functions()
    if BUILT_IN not in get_all_models():
        register_builtin_configs_from_helm_package()


prepare()
