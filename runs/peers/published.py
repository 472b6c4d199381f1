"""Figures that others published, and those of a pipeline that were measured elsewhere; they stand beside what is measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flexgen_helm.errors import FlexGenError


@dataclass(frozen=True)
class Figure:
    """A throughput that this command did not measure."""

    name: str
    setting: str
    tokens_per_second: float
    source: str
    """Where it is from; ``published: ...`` for figures of papers."""


_TABLE_2 = "published: FlexGen paper, table 2, T4"
_TABLE_3 = "published: FlexGen paper, table 3, T4"
_NEAR = "512 + 32, under 10 ms, 1 Gbit/s"
PUBLISHED = (
    Figure("Petals", f"OPT-6.7B, {_NEAR}, 1 GPU", 8.25, _TABLE_2),
    Figure("Petals", f"OPT-30B, {_NEAR}, 4 GPUs, of each GPU", 2.84, _TABLE_2),
    Figure("Petals", f"OPT-175B, {_NEAR}, 24 GPUs, of each GPU", 0.08, _TABLE_2),
    Figure("Petals", "OPT-175B, 100 ms, 100 Mbit/s, of each GPU", 0.01, "published: FlexGen paper, table 13, T4"),
    Figure("FlexGen", "OPT-30B, 512 + 32, 1 GPU", 7.32, _TABLE_2),
    Figure("FlexGen", "OPT-30B, 512 + 32, pipeline of 4 GPUs", 23.61, _TABLE_3),
    Figure("DeepSpeed", "OPT-30B, 512 + 32, 1 GPU", 0.60, _TABLE_2),
    Figure("Accelerate", "OPT-30B, 512 + 32, 1 GPU", 0.62, _TABLE_2),
)


def read_pipeline(file: Path) -> list[Figure]:
    """Read figures of a pipeline: a JSON list of objects with ``setting`` and ``tokens_per_second``, and ``command`` if known.

    Raises:
        FlexGenError: The file cannot be read as that.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        source = f"measured: {file.name}"
        return [
            Figure("pipeline", str(row["setting"]), float(row["tokens_per_second"]), str(row.get("command", source)))
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FlexGenError(
            f"{file} has no figures of a pipeline ({error!r}). Write a JSON list such as "
            '[{"setting": "OPT-30B, 4 stages, 10 ms, 1 Gbit/s", "tokens_per_second": 1.5, "command": "torchrun ..."}].'
        ) from error
