"""Plots of a plan: the latency-throughput frontier (the paper's Fig. 1), and the timeline of one sweep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexgen_helm.errors import FlexGenError
from flexgen_helm.fidelity.plot import check_matplotlib
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.search.choice import Choice
from flexgen_helm.policy.planner.search.choose import Problem, frontier
from flexgen_helm.policy.planner.simulate import timeline
from flexgen_helm.policy.planner.sweeps import sweep_loads

