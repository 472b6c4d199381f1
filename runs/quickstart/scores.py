"""Reads what ``helm-run`` wrote and lays it out as a table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from flexgen_helm.helm.report import WORKLOAD_FILE


@dataclass(frozen=True)
class Score:
    """What one run entry reached."""

    run: str
    metric: str
    value: float
    requests: int
    prompt_tokens: int


@dataclass(frozen=True)
class Work:
    """What the engine did for all run entries together."""

    requests: int
    cached: int
    seconds: float
    prompt_tokens_asked: int
    prompt_tokens_computed: int

    @property
    def requests_per_second(self) -> float | None:
        """Rate of the requests that were computed; None if all were cached."""
        return (self.requests - self.cached) / self.seconds if self.requests > self.cached else None


def read_scores(suite_folder: Path, schema: Path) -> list[Score]:
    """Read the main metric of every run of a suite.

    Args:
        suite_folder: ``<output path>/runs/<suite>``.
        schema: HELM schema whose run groups name main metric and split.
    """
    groups = yaml.safe_load(schema.read_text(encoding="utf-8"))["run_groups"]
    environments = {group["name"]: group["environment"] for group in groups if "environment" in group}
    return [_read_score(path.parent, environments) for path in sorted(suite_folder.glob("*/stats.json"))]


def _read_score(run_folder: Path, environments: dict[str, dict[str, str]]) -> Score:
    run_spec = _json(run_folder / "run_spec.json")
    # The last group of a run entry is the most specific one.
    environment = next(environments[group] for group in reversed(run_spec["groups"]) if group in environments)
    means = {
        stat["name"]["name"]: stat["mean"]
        for stat in _json(run_folder / "stats.json")
        if stat["name"].get("split") == environment["main_split"] and "perturbation" not in stat["name"] and stat["count"]
    }
    requests = len(_json(run_folder / "scenario_state.json")["request_states"])
    return Score(
        run=run_folder.name.split(",model=")[0],
        metric=environment["main_name"],
        value=means[environment["main_name"]],
        requests=requests,
        prompt_tokens=round(means["num_prompt_tokens"] * requests),
    )


def read_work(suite_folder: Path) -> Work:
    """Read the report that the runner left in the suite's folder."""
    reports = _json(suite_folder / WORKLOAD_FILE)

    def total(name: str) -> int:
        return int(sum(report["stats"][name] for report in reports))

    return Work(
        requests=sum(report["num_requests"] for report in reports),
        cached=sum(report["num_cached"] for report in reports),
        seconds=sum(report["stats"]["seconds"] for report in reports),
        prompt_tokens_asked=total("prompt_tokens_asked"),
        prompt_tokens_computed=total("prompt_tokens_computed"),
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def render(scores: list[Score], work: Work) -> str:
    """Return the table and the line about the work below it."""
    table = pd.DataFrame(
        {
            "run entry": [score.run for score in scores],
            "metric": [score.metric for score in scores],
            "score": [f"{score.value:.3f}" for score in scores],
            "requests": [score.requests for score in scores],
            "prompt tokens": [score.prompt_tokens for score in scores],
        }
    )
    return f"{table.to_string(index=False)}\n\n{_render_work(work)}"


def _render_work(work: Work) -> str:
    rate = work.requests_per_second
    if rate is None:
        return f"All {work.requests} requests were answered from HELM's cache."
    saved = work.prompt_tokens_asked / max(work.prompt_tokens_computed, 1)
    cached = f" ({work.cached} more from HELM's cache)" if work.cached else ""
    return (
        f"{work.requests - work.cached} requests in {work.seconds:.0f} s, {rate:.2f} requests/s{cached}. "
        f"Prompt tokens: {work.prompt_tokens_asked:,} asked, {work.prompt_tokens_computed:,} computed "
        f"({saved:.1f} times fewer, because shared prefixes are computed once)."
    )
