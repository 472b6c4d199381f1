"""HELM's summarizer with the figures of the engine and of fidelity, for ``helm-summarize --summarizer-class-name``.

A suite shows them by a run group `GROUP` in its schema, whose metric group names metrics with the prefix `PREFIX`, such as
``flexgen_bits`` and ``flexgen_kl_mean``; their split is ``__all__``. `runs/accuracy_vs_compression/schema.yaml` has them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from helm.benchmark.metrics.metric_name import MetricName
from helm.benchmark.metrics.statistic import Stat
from helm.benchmark.presentation import summarize
from helm.benchmark.scenarios.scenario import ScenarioSpec

from flexgen_helm.reports import runs as files
from flexgen_helm.reports.engine_figures import Cell, engine_cells, fidelity_cells
from flexgen_helm.reports.engine_record import EngineRecord, engine_record
from flexgen_helm.reports.fidelity_results import FidelityResult, find_fidelity, read_fidelity

GROUP = "compression"
"""Run group in which every deployment has one run, that of its engine."""
PREFIX = "flexgen_"
ENGINE = ScenarioSpec("flexgen_helm", {})
"""What stands for a scenario in `GROUP`; none is made of it."""


class FlexGenSummarizer(summarize.Summarizer):
    """Adds a run group of figures. Schemas that do not name it are shown as by HELM's own summarizer."""

    def group_runs(self) -> None:
        """Group the runs, and put figures of each deployment's engine into `GROUP`.

        Raises:
            CorruptFile: What this package recorded of a run cannot be read.
        """
        super().group_runs()
        if GROUP not in self.schema.name_to_run_group:
            return
        served: dict[str, list[summarize.Run]] = defaultdict(list)
        for run in self.runs:
            served[run.run_spec.adapter_spec.model_deployment].append(run)
        engines = {name: [_engine(run) for run in runs] for name, runs in served.items()}
        baselines = [engine for found in engines.values() for engine in found[:1] if engine and engine.variant is None]
        results = read_fidelity(None)
        for name, runs in served.items():
            cells = [*engine_cells(engines[name]), *fidelity_of(engines[name][0], baselines, results)]
            stats = [_stat(cell) for cell in cells if not math.isnan(cell.value)]
            spec = replace(runs[0].run_spec, groups=[GROUP])
            figures = replace(runs[0], run_spec=spec, stats=stats)
            self.group_adapter_to_runs[GROUP][spec.adapter_spec].append(figures)
            self.group_scenario_adapter_to_runs[GROUP][ENGINE][spec.adapter_spec].append(figures)


def fidelity_of(
    engine: EngineRecord | None, baselines: Sequence[EngineRecord], results: Iterable[FidelityResult]
) -> list[Cell]:
    """Return the figures of the result of fidelity that compares an engine with a baseline.

    Args:
        engine: The candidate; None: not recorded.
        baselines: Engines without a variant; the first one counts with which there is a result.
        results: As `read_fidelity` returned them.
    """
    results = list(results)
    for baseline in baselines if engine is not None and engine.variant is not None else ():
        found = find_fidelity(results, baseline, engine)
        if found is not None:
            return fidelity_cells(found, baseline, engine)
    return []


def _engine(run: summarize.Run) -> EngineRecord | None:
    content = files.Run(Path(run.run_path)).record()
    return None if content is None else engine_record(content)


def _stat(cell: Cell) -> Stat:
    return Stat(MetricName(f"{PREFIX}{cell.figure}")).add(cell.value)
