"""Verdicts of self-checks that models passed, kept in the cache folder: an equal check gives an equal verdict."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from flexgen_helm.attention.paged.trial import HeadShape
from flexgen_helm.cache_folder import cache_folder, read_record, write_record
from flexgen_helm.machine.identity import code_identity, machine_identity
from flexgen_helm.rows.choice import Kind, KindChoice, Passed
from flexgen_helm.rows.self_check import LayerCache, Verdict
from flexgen_helm.types import ResolvedPolicy, WeightNumerics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """Everything that decides what a self-check finds. A check under another processor or other code is another check."""

    weights: WeightNumerics
    policy: ResolvedPolicy
    """Policy with the row sizes."""
    rows: KindChoice
    """Kind of rows that the user asked for."""
    _: KW_ONLY
    kv_dtype: str
    """Dtype in which attention reads K and V."""
    device: torch.device
    whole: bool
    """Whether the whole model is checked; otherwise its first layers."""
    compiled: bool = False
    """Whether layers are compiled."""

    @property
    def file(self) -> Path:
        """File that keeps the verdict. Its name is a digest of everything that decides it."""
        decisive = {
            "weights": asdict(self.weights),
            "row_sizes": [self.policy.gpu_batch_size, self.policy.gpu_batch_tokens],
            "rows": self.rows,
            "kv_dtype": self.kv_dtype,
            "whole": self.whole,
            "compiled": self.compiled,
            **code_identity(),
            **machine_identity(self.device),
        }
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]
        return cache_folder() / "verdicts" / f"{digest}.json"


def recall(name: str, check: Check) -> Passed | None:
    """Return what an earlier check found, and log that it is not repeated.

    Args:
        name: Name of the model, for the log.
        check: The check.

    Returns:
        What it found; None if no equal check passed, or if its file cannot be read.
    """
    with suppress(OSError, ValueError, TypeError, KeyError):
        passed = _from_plain(read_record(check.file))
        part = "model" if check.whole else "first layers"
        logger.info("%s: the %s passed the self-check before on this machine; recheck repeats it", name, part)
        return passed
    return None


def remember(check: Check, passed: Passed) -> None:
    """Keep what a check found; where that fails, the next engine checks again."""
    with suppress(OSError):
        write_record(check.file, asdict(passed))


def _from_plain(plain: dict[str, Any]) -> Passed:
    """Return the outcome for a dictionary that `dataclasses.asdict` made and JSON kept."""
    verdict, not_packed = plain["verdict"], plain["not_packed"]
    layers = tuple(LayerCache(tuple(map(int, one["per_token"])), int(one["per_sequence"])) for one in verdict["layers"])
    heads = tuple(HeadShape(*map(int, shape)) for shape in verdict["heads"])
    if plain["kind"] not in ("packed", "single") or not isinstance(verdict["bit_stable"], bool):
        raise ValueError("another form")
    return Passed(
        cast(Kind, plain["kind"]),
        Verdict(float(verdict["worst_difference"]), verdict["bit_stable"], layers, heads),
        None if not_packed is None else str(not_packed),
    )
