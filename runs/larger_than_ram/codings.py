"""The engine alone, with slabs of each coding: the same prompts, memory limit and threads, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from flexgen_helm.errors import FlexGenError
from flexgen_helm.memory.amounts import gib
from flexgen_helm.runs.larger_than_ram.contenders import Ours, Work, run_engine
from flexgen_helm.runs.memory_limit.process import Limits

BASE = "plain"
"""The coding with which the others are compared."""


def run_codings(
    work: Work, model: Path, arguments: dict[str, Any], limits: Limits, scratch: Path, *, codings: Sequence[str]
) -> dict[str, Ours]:
    """Let the engine answer all prompts with slabs of each coding, in folders beside each other.

    Raises:
        FlexGenError: If the answers differ.
        OutOfSpace: If the kernel killed it.
    """
    found = {}
    for coding in codings:
        policy = {**arguments["policy"], "slab_coding": coding}
        folder = f"{arguments['offload_folder']}-{coding}"
        own = Limits(limits.memory_bytes, limits.threads, (*limits.folders, Path(folder)))
        found[coding] = run_engine(work, model, {**arguments, "policy": policy, "offload_folder": folder}, own, scratch)
        if found[coding].answers.tokens != found[codings[0]].answers.tokens:
            raise FlexGenError(f"Answers with slab_coding={coding} differ from those with {codings[0]}. Report this.")
    return found


def render(work: Work, found: dict[str, Ours]) -> list[str]:
    """Make the lines that a person reads."""
    lines = [
        f"{work.title}: {len(work.prompts)} prompts, {work.new_tokens} new tokens each, equal answers",
        f"  {'slabs':10}{'on disk':>10}{'requests/s':>12}{'seconds':>9}{'processor':>11}{'sweeps':>8}{'decoding':>10}"
        f"{'disk, GB/s: direct':>20}{'reached':>9}{'loading':>9}",
    ]
    for coding, ours in found.items():
        us = ours.answers
        lines.append(
            f"  {coding:10}{gib(us.weight_bytes['disk']):>10}{us.rate:>12.3f}{us.seconds:>9.1f}{us.processor_s:>11.1f}"
            f"{us.stats['sweeps']:>8}{_decoding_seconds(ours):>10.2f}{ours.measured.disk / 1e9:>20.2f}"
            f"{us.disk_rate(decoding=False) / 1e9:>9.2f}{us.load_s:>9.1f}"
        )
    if BASE in found:
        plain = found[BASE].answers
        lines += [
            f"  {coding} / {BASE}: {ours.answers.rate / plain.rate:.2f} times the requests/s, "
            f"{ours.answers.processor_s / plain.processor_s:.2f} times the processor time, "
            f"{plain.weight_bytes['disk'] / ours.answers.weight_bytes['disk']:.2f} times fewer bytes"
            for coding, ours in found.items()
            if coding != BASE
        ]
    return lines


def as_dict(found: dict[str, Ours]) -> dict[str, Any]:
    """Everything measured, in plain types, without the answers themselves."""
    return {
        coding: {
            "requests_per_second": ours.answers.rate,
            "seconds": ours.answers.seconds,
            "processor_s": ours.answers.processor_s,
            "seconds_of_a_decoding_sweep": _decoding_seconds(ours),
            "load_s": ours.answers.load_s,
            "weight_bytes": ours.answers.weight_bytes,
            "direct_read": ours.measured.disk,
            "sweeps": [asdict(sweep) for sweep in ours.answers.sweeps],
        }
        for coding, ours in found.items()
    }


def _decoding_seconds(ours: Ours) -> float:
    """Mean seconds of the sweeps that decode and compute no prompt; 0 without any."""
    seconds = [sweep.seconds for sweep in ours.answers.sweeps if sweep.decode_tokens and not sweep.prompt_tokens]
    return fmean(seconds) if seconds else 0.0
