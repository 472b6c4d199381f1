"""The pages: one of figures, one of the instances that flipped. Each is one file that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from flexgen_helm.reports.presentation.grid import Grid
from flexgen_helm.reports.presentation.plots import Plot
from flexgen_helm.reports.presentation.words import ABSENT, labels
from flexgen_helm.reports.reading import Key

MOST_FLIPS = 5000
"""Flipped instances on a page; a browser takes seconds for more."""


def _environment() -> Environment:
    loader = PackageLoader("flexgen_helm.reports.presentation", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data"] = _data_address
    return environment


def _data_address(svg: bytes) -> str:
    """Return a picture as an address. In an ``img`` no script of it runs, and its identifiers meet no others."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def render_report(title: str, facts: Sequence[str], grids: Sequence[Grid], plots: Sequence[Plot], num_flips: int) -> str:
    """Return the page of figures."""
    template = _environment().get_template("report.html.j2")
    return template.render(title=title, facts=facts, grids=grids, plots=plots, num_flips=num_flips)


def render_flips(title: str, flips: pd.DataFrame, texts: Mapping[tuple[str, Key], str]) -> str:
    """Return the page of flipped instances.

    Args:
        title: Of the page.
        flips: As `flexgen_helm.reports.flipped.flipped` returned them, of all candidates.
        texts: What was asked, by run entry and key.
    """
    shown = flips.head(MOST_FLIPS)
    prompts: dict[str, int] = {}
    rows = [_flip(row, texts, prompts) for row in shown.to_dict("records")]
    short = labels(sorted(map(str, flips["scenario"].unique())))
    for row in rows:
        row["run"] = short[row["scenario"]]
    choices = {name: sorted(map(str, flips[name].unique())) for name in ("configuration", "scenario", "change")}
    template = _environment().get_template("flips.html.j2")
    return template.render(title=title, rows=rows, total=len(flips), choices=choices, prompts=list(prompts))


def _flip(row: Mapping[Any, Any], texts: Mapping[tuple[str, Key], str], prompts: dict[str, int]) -> dict[str, Any]:
    text = texts.get((row["scenario"], Key(*(row[name] for name in Key._fields))), "")
    number = prompts.setdefault(text, len(prompts))
    names = [name for name in row if name.endswith(("_before", "_after")) and "logprob" in name]
    return {**row, "text": number, **{name: ABSENT if pd.isna(row[name]) else f"{row[name]:.3f}" for name in names}}
