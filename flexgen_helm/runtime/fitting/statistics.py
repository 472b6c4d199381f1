"""Statistics of a model's matrices, from one pass over random tokens, or over text that the model wrote.

The pass goes layer by layer, forward and then, within the layer, backward, so that the model may be larger than memory. What it
found is kept after every layer, so that a killed process goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flexgen_helm.compression.matrices import matrix_tensors
from flexgen_helm.compression.scheme import MatrixKey, Parts, Scheme
from flexgen_helm.errors import CorruptFile
from flexgen_helm.loading.source import LoadedModel, ModelSource
from flexgen_helm.memory.slab import Binding, layout_of
from flexgen_helm.model.experts import register_sliced_experts
from flexgen_helm.model.recorder import Implementations, RecordedModel, Recording
from flexgen_helm.runtime.fitting.files import load_checked, save_checked
from flexgen_helm.runtime.fitting.gradients import known_sensitivities, replay_with_gradients, watched
from flexgen_helm.runtime.fitting.packing import PackedLayers
from flexgen_helm.runtime.fitting.progress import LayerProgress

NUM_ROWS, ROW_TOKENS = 4, 512
"""Sequences of random tokens, and tokens in each; the end token is first (facts: more gain nothing)."""
SEED = 0
DESCRIPTION = f"{NUM_ROWS} x {ROW_TOKENS} random tokens, seed {SEED}"
NEXT, SEPARATOR = "next_layer", ":"


def observe_model(source: ModelSource, scheme: Scheme, folder: Path, tokens: Tensor | None = None) -> dict[MatrixKey, Parts]:
    """Run a model over tokens and return what a scheme observes of each matrix.

    Args:
        source: The model. It is computed in float32, so that statistics do not depend on the engine's dtype.
        scheme: The scheme.
        folder: Folder for what was found so far; it is made if it is missing.
        tokens: int64 ``[rows, tokens]``; None: random tokens.

    Raises:
        CorruptFile: If files of the model are missing or torn.
        DiskFull: If there is no space for the statistics.
        UnsupportedModel: If a layer cannot be differentiated.
    """
    source = replace(source, dtype=torch.float32)
    loaded = source.described(source.read(PackedLayers()))
    model = RecordedModel(loaded.model, device=source.device)
    model.use(Implementations(model.own.attention, register_sliced_experts()))
    with torch.no_grad():
        rows = [_record(model, ids) for ids in (random_tokens(loaded) if tokens is None else tokens)]
    checkpoints = _Checkpoints(folder)
    found = checkpoints.resume(rows)
    with LayerProgress("statistics", len(model.layers)) as progress:

        def keep(j: int, parts: dict[MatrixKey, Parts]) -> None:
            found.update(parts)
            checkpoints.save(j, parts, rows)
            progress.done(j)

        source.read_layers(_LayerObserver(model, rows, scheme, keep, first=checkpoints.next_layer))
    return found


def random_tokens(loaded: LoadedModel) -> Tensor:
    """Return random token ids ``[rows, tokens]``, each row behind an end token; they do not depend on the machine."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(loaded.vocab_size, (NUM_ROWS, min(ROW_TOKENS, loaded.max_length)), generator=generator)
    tokens[:, 0] = min(loaded.end_token_ids, default=0)
    return tokens


def _record(model: RecordedModel, ids: Tensor) -> Recording:
    ids = ids[None].to(model.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return model.record(
        Recording(), input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False
    )


class _LayerObserver:
    """A keeper that runs each layer over the rows as soon as it is read, and then empties it."""

    def __init__(
        self,
        model: RecordedModel,
        rows: list[Recording],
        scheme: Scheme,
        on_layer: Callable[[int, dict[MatrixKey, Parts]], None],
        *,
        first: int,
    ) -> None:
        self._model, self._rows, self._scheme, self._on_layer, self._first = model, rows, scheme, on_layer, first

    def has(self, j: int) -> bool:
        return j < self._first

    def keep(self, j: int, layer: nn.Module) -> None:
        target = self._model.layers[j]
        values = {tensor.name: tensor.values(j, layer) for tensor in matrix_tensors(layer)}
        target.load_state_dict({name: x.to(self._model.device) for name, x in layer.state_dict().items()}, assign=True)
        tensors = matrix_tensors(target)
        num_tokens = 0
        with watched(target, tensors) as seen:
            for k, row in enumerate(self._rows):
                replay_with_gradients(self._model, j, row, seed=j * len(self._rows) + k)
                num_tokens += len(row.tokens)
        found: dict[MatrixKey, Parts] = {}
        for name, known in known_sensitivities(seen, num_tokens).items():
            for i, (weight, own) in enumerate(zip(values[name], known, strict=True)):
                found[f"{j}/{name}/{i}"] = self._scheme.observe(weight, own)
        Binding(target, layout_of(target)).to_meta()
        Binding(layer, layout_of(layer)).to_meta()
        self._on_layer(j, found)


class _Checkpoints:
    """What was found, one file a layer, and the hidden states behind the last of these layers."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._hidden = folder, folder / "hidden.safetensors"
        self.next_layer = 0

    def resume(self, rows: list[Recording]) -> dict[MatrixKey, Parts]:
        """Read what there is, and put the hidden states into the rows."""
        hidden = self._read(self._hidden)
        layers = [] if hidden is None else [self._read(self._file(j)) for j in range(int(hidden[NEXT]))]
        if hidden is None or None in layers:
            return {}
        self.next_layer = len(layers)
        for k, row in enumerate(rows):
            assert row.hidden is not None
            row.hidden = hidden[str(k)].to(row.hidden.device)
        found: dict[MatrixKey, Parts] = {}
        for name, x in (item for tensors in layers if tensors for item in tensors.items()):
            key, _, part = name.rpartition(SEPARATOR)
            found.setdefault(key, {})[part] = x
        return found

    def save(self, j: int, parts: dict[MatrixKey, Parts], rows: list[Recording]) -> None:
        """Keep what layer j gave. Layers that return more than a hidden state begin again after a kill."""
        if any(row.extra_outputs for row in rows):
            return
        hidden = {str(k): row.hidden for k, row in enumerate(rows) if row.hidden is not None}
        save_checked(self._file(j), {f"{key}{SEPARATOR}{name}": x for key, each in parts.items() for name, x in each.items()})
        save_checked(self._hidden, {**hidden, NEXT: torch.tensor(j + 1)})

    def _file(self, j: int) -> Path:
        return self._folder / f"layer_{j:05d}.safetensors"

    def _read(self, file: Path) -> dict[str, Tensor] | None:
        try:
            return load_checked(file)
        except CorruptFile:
            return None
