"""Evaluate language models that are larger than their GPU or their RAM, with HELM.

`Engine` and `evaluate` are loaded on first use: HELM imports its plugins at every start, and torch would cost seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexgen_helm.errors import CorruptFile, FlexGenError, InvalidJob, OutOfSpace, PolicyError, UnsupportedModel
from flexgen_helm.run_stats import RunStats
from flexgen_helm.types import Completion, Job, Policy, Result, TokenLogprob

if TYPE_CHECKING:
    from flexgen_helm.evaluation.python import EvaluationFailed, Scores, evaluate
    from flexgen_helm.runtime.engine import Engine

__all__ = [
    "Completion",
    "CorruptFile",
    "Engine",
    "EvaluationFailed",
    "FlexGenError",
    "InvalidJob",
    "Job",
    "OutOfSpace",
    "Policy",
    "PolicyError",
    "Result",
    "RunStats",
    "Scores",
    "TokenLogprob",
    "UnsupportedModel",
    "evaluate",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from flexgen_helm.runtime.engine import Engine

        return Engine
    if name in ("EvaluationFailed", "Scores", "evaluate"):
        from flexgen_helm.evaluation import python

        return getattr(python, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
