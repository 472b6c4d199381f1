"""Where the slabs of a model are, and what their folders say that they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import __version__ as transformers_version

from flexgen_helm.cache_folder import cache_folder
from flexgen_helm.compression.lossless_slab import FORMAT_VERSION
from flexgen_helm.memory.slab_folder import SlabFolder
from flexgen_helm.types import SlabCoding, WeightNumerics


def slab_identity(weights: WeightNumerics, coding: SlabCoding = "plain") -> dict[str, str]:
    """Return everything that decides the bytes of a model's slabs, with transformers' version: it names and fuses tensors."""
    coded = {} if coding == "plain" else {"coding": f"{coding} {FORMAT_VERSION}"}
    # Slabs without this note have tensors in 16 bits that transformers keeps in float32.
    kept = {} if weights.dtype == "float32" else {"kept in float32": "as loaded"}
    return {**asdict(weights), "transformers": transformers_version, **coded, **kept}


def default_folder(weights: WeightNumerics, identity: Mapping[str, str], kind: str = "offload") -> Path:
    """Return a folder that no other slabs share: everything that decides their bytes is in its name."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return cache_folder() / kind / f"{weights.digest[:32]}-{weights.dtype}-{weights.scheme}-{digest}"


@dataclass(frozen=True)
class SlabPlaces:
    """The folders in which slabs of a model may be."""

    weights: WeightNumerics
    given: Path | None
    """Folder that the user gave for slabs of any coding; None: each coding has one of its own."""

    def folder(self, coding: SlabCoding) -> Path:
        """Return the folder for slabs of a coding; it may not exist."""
        return self.given or default_folder(self.weights, slab_identity(self.weights, coding))

    def found(self) -> list[SlabCoding]:
        """Return the codings of which slabs are there."""
        codings: tuple[SlabCoding, ...] = ("plain", "lossless")
        return [each for each in codings if SlabFolder.claimed(self.folder(each)) == slab_identity(self.weights, each)]

    def coded_bytes(self) -> dict[int, int]:
        """Return the bytes of each lossless slab that is there, by number."""
        if "lossless" not in self.found():
            return {}
        return {j: layout.num_bytes for j, layout in SlabFolder.described(self.folder("lossless")).items()}
