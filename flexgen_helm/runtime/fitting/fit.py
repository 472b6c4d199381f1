"""Quantise a model into a folder of slabs, unless they are there: statistics, one decision about all matrices, packing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from flexgen_helm.compression.matrices import matrix_tensors
from flexgen_helm.compression.scheme import MatrixKey, Parts, Scheme
from flexgen_helm.compression.slab_format import CompressedSlab, compressed_slab
from flexgen_helm.errors import CorruptFile
from flexgen_helm.loading.source import ModelSource
from flexgen_helm.memory.allocator import LARGE_TENSOR_MAPS
from flexgen_helm.memory.slab import SlabLayout, layout_of
from flexgen_helm.memory.slab_folder import SlabFolder
from flexgen_helm.model.layers import layers_of, refuse_shared_layers
from flexgen_helm.policy.shapes_of_model import own_head
from flexgen_helm.runtime.fitting import own_text
from flexgen_helm.runtime.fitting.files import save_tensors
from flexgen_helm.runtime.fitting.matrices_of_model import ModelMatrices
from flexgen_helm.runtime.fitting.packing import PackedLayers, PackingKeeper
from flexgen_helm.runtime.fitting.progress import LayerProgress
from flexgen_helm.runtime.fitting.statistics import DESCRIPTION, observe_model

logger = logging.getLogger(__name__)

DECISIONS = "decisions.safetensors"
FIT_FOLDER = "fit"
"""Within the folder of slabs: statistics and decisions, which have an identity before there are slabs."""
STATISTICS = "statistics"
"""Within `FIT_FOLDER`."""
SEPARATOR = ":"


@dataclass(frozen=True)
class FittedModel:
    """A quantised model.

    Attributes:
        slabs: Folder of its slabs, all complete. Whoever uses it closes it.
        formats: Formats of the layers, and of an output head with weights of its own, by number.
        decisions: Digest of what the scheme decided from statistics; empty if it needs none.
        statistics: What made the statistics, in words; empty if it needs none.
    """

    slabs: SlabFolder
    formats: Mapping[int, CompressedSlab]
    decisions: str
    statistics: str

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight of the compressed matrices, with everything that is stored of them."""
        count = sum(each.num_weights for each in self.formats.values())
        return 8 * sum(each.matrix_bytes for each in self.formats.values()) / max(1, count)

    @property
    def num_bytes(self) -> int:
        """Bytes of all slabs."""
        return sum(each.stored.num_bytes for each in self.formats.values())


def fit(
    source: ModelSource, scheme: Scheme, folder: Path, identity: Mapping[str, str], write_text: Callable[[Path], Tensor]
) -> FittedModel:
    """Return a quantised model. What is missing in its folder is made; a killed process goes on where it was.

    Args:
        source: The model.
        scheme: Scheme of the matrices.
        folder: Folder of this model and scheme.
        identity: Everything else that decides the bytes of the slabs.
        write_text: Lets the model, with its slabs in a folder that is removed afterwards, write the text of schemes that are
            fitted to it; called if it is missing.

    Raises:
        UnsupportedModel: If layers share weights.
        CorruptFile: If files are missing, torn, or of another model or scheme.
        DiskFull: If there is no space.
    """
    with LARGE_TENSOR_MAPS.hold():
        return _fit(source, scheme, folder, identity, write_text)


def _fit(
    source: ModelSource, scheme: Scheme, folder: Path, identity: Mapping[str, str], write_text: Callable[[Path], Tensor]
) -> FittedModel:
    whole = source.empty
    refuse_shared_layers(whole)
    units = dict(enumerate([*layers_of(whole), *filter(None, [own_head(whole)])]))
    with closing(SlabFolder(folder / FIT_FOLDER, identity, {}, parts=[STATISTICS])) as own:
        decided, digest = _decide(source, scheme, own.path, write_text) if scheme.needs_statistics else ({}, "")
    found = SlabFolder.described(folder)
    slabs = SlabFolder(folder, {**identity, "decisions": digest}, {j: found[j] for j in units if j in found})
    try:
        missing = [j for j in units if j not in found or j in slabs.missing()]
        if missing:
            _pack(source, scheme, decided, slabs, units, missing)
            found = SlabFolder.described(folder)
    except BaseException:
        slabs.close()
        raise
    formats = {j: _format(unit, found[j], scheme) for j, unit in units.items()}
    return FittedModel(slabs, formats, digest, _describe(scheme))


def _describe(scheme: Scheme) -> str:
    if scheme.own_text:
        return own_text.DESCRIPTION
    return DESCRIPTION if scheme.needs_statistics else ""


def _decide(
    source: ModelSource, scheme: Scheme, folder: Path, write_text: Callable[[Path], Tensor]
) -> tuple[dict[MatrixKey, Parts], str]:
    """What the scheme decided about each matrix, and the digest of its file."""
    file = folder / DECISIONS
    if not file.exists():
        logger.info("%s: statistics for compression, once; they are kept in %s", source.name, folder)
        tokens = own_text.kept_text(folder / STATISTICS, write_text) if scheme.own_text else None
        observed = observe_model(source, scheme, folder / STATISTICS, tokens)
        decided = scheme.solve(observed, ModelMatrices(source, list(observed)))
        save_tensors(file, {f"{key}{SEPARATOR}{name}": x for key, parts in decided.items() for name, x in parts.items()})
    found: dict[MatrixKey, Parts] = {}
    try:
        content = file.read_bytes()
        for name, x in load(content).items():
            key, _, part = name.rpartition(SEPARATOR)
            found.setdefault(key, {})[part] = x
        return found, sha256(content).hexdigest()[:32]
    except (OSError, SafetensorError) as error:
        raise CorruptFile(f"{file} cannot be read ({error}). Delete the folder {folder}; it is made again.") from error


def _pack(
    source: ModelSource,
    scheme: Scheme,
    decided: Mapping[MatrixKey, Parts],
    slabs: SlabFolder,
    units: Mapping[int, nn.Module],
    missing: list[int],
) -> None:
    """Write the slabs that are missing, from the checkpoint's values in float32."""
    logger.info("%s: quantising %s of %s parts into %s", source.name, len(missing), len(units), slabs.path)
    num_layers = len(layers_of(source.empty))
    with LayerProgress("quantising", num_layers) as progress:
        keeper = PackingKeeper(slabs, units.keys() - set(missing), scheme, decided, progress)
        source = replace(source, dtype=torch.float32)
        source.read_layers(keeper)
        if num_layers in missing:
            head = own_head(source.read(PackedLayers()))
            assert head is not None
            keeper.write(num_layers, head, {})


def _format(unit: nn.Module, stored: SlabLayout, scheme: Scheme) -> CompressedSlab:
    return compressed_slab(stored, layout_of(unit), scheme, {tensor.name: tensor for tensor in matrix_tensors(unit)})
