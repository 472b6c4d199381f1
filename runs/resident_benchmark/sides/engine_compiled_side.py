"""The engine with compiled layers."""

from __future__ import annotations

from functools import partial

from flexgen_helm.runs.resident_benchmark.sides import engine_side

ways = partial(engine_side.ways, compile_layers=True)
