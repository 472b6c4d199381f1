"""Where the weights of a checkpoint go: transformers' own conversion, given the tensors of one part of the model at a time.

The library's `from_pretrained` reads ahead of its conversion without a bound: a mixture of experts needs the memory of six
layers more than the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from flexgen_helm.errors import CorruptFile
from flexgen_helm.loading.checkpoint import StoredTensor, group_by_layer
from flexgen_helm.loading.wrapped_names import renaming_advice, shorter_names


class Checkpoint:
    """The files of a model folder as a source of weights for a model on the meta device."""

    def __init__(
        self,
        name: str,
        folder: Path,
        model: PreTrainedModel,
        stored: Iterable[StoredTensor],
        *,
        dtype: torch.dtype,
        partly: bool = False,
    ) -> None:
        """Find the place of each tensor; nothing is read.

        Args:
            name: For messages.
            folder: Of the model.
            model: Whose parts are filled.
            stored: What the files hold.
            dtype: Of the weights; some modules keep float32.
            partly: Whether it is meant that the files hold more than the model.

        Raises:
            CorruptFile: If a tensor has another shape than in the model.
        """
        self._name, self._folder, self._model = name, folder, model
        self._mapping = cast(Any, get_model_conversion_mapping(model))
        self._settings = LoadStateDictConfig(
            pretrained_model_name_or_path=str(folder),
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=self._mapping,
        )
        self._empty: dict[str, torch.Tensor] = model.state_dict()
        tensors = sorted(stored, key=lambda tensor: dot_natural_key(tensor.name))
        self._targets = self._checked_targets(tensors)
        if partly:
            tensors = [tensor for tensor in tensors if self._targets[tensor.name] in self._empty]
        self._parts = group_by_layer(tensors, self._targets.__getitem__)
        self.unexpected: set[str] = set()
        self.num_bytes = sum(tensor.num_bytes for tensor in tensors)
        """Of all that can be read."""
        self.on_read: Callable[[int], object] = int
        """Called with the number of bytes that were read."""

    def parts(self) -> list[str]:
        """The parts of which the files hold anything, in natural order of the files' names."""
        return list(self._parts)

    def fill(self, part: str) -> set[str]:
        """Read and convert the tensors of a part, and put them into the model, on the CPU.

        Args:
            part: Of the model; nothing happens if the files hold nothing of it.

        Returns:
            The names of the model's tensors that have a value now.

        Raises:
            CorruptFile: If they do not fit the model.
        """
        tensors = self._parts.get(part, [])
        state = {tensor.name: tensor for tensor in tensors}
        info: LoadStateDictInfo = convert_and_load_state_dict_in_model(self._model, state, self._settings)[0]
        self._refuse_misfits(tensors, info)
        self.unexpected |= info.unexpected_keys
        self.on_read(sum(tensor.num_bytes for tensor in tensors))
        return self._empty.keys() - info.missing_keys

    def lacks(self, names: list[str]) -> CorruptFile:
        """The error for tensors that no file holds."""
        why = (
            self._written_by_wrapper(names)
            or self._without_head(names)
            or f"Fetch {self._folder} again, or give the config that belongs to its weights."
        )
        return CorruptFile(
            f"The weights of {self._name} lack {len(names)} tensors of its config: {', '.join(names[:5])}"
            f"{', ...' if len(names) > 5 else ''}. {why}"
        )

    def _written_by_wrapper(self, lacking: list[str]) -> str | None:
        """What to do if the files have the lacking tensors under names that are longer."""
        for name, target in self._targets.items():
            if target not in self._empty:
                for found in shorter_names(name):
                    if self._target(found.short)[0] in lacking:
                        return renaming_advice(self._folder, self._targets, name, found)
        return None

    def _without_head(self, lacking: list[str]) -> str | None:
        head = self._model.get_output_embeddings()
        if {self._model.get_submodule(name.rpartition(".")[0]) for name in lacking} != {head}:
            return None
        named = ", ".join(map(str, self._model.config.architectures or ["no architectures"]))
        return (
            f"That is the head, which predicts tokens (config.json names {named}). Give a checkpoint of the causal language "
            f"model, or fetch {self._folder} again if its files once held the head."
        )

    def _target(self, name: str) -> tuple[str, str | None]:
        """Return the name in the model of a tensor of the files, and the pattern of the conversion that makes it, if any."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        key, pattern = rename_source_key(name, renamings, converters, self._model.base_model_prefix, self._empty)
        return (name, None) if key not in self._empty and name in self._empty else (key, pattern)

    def _checked_targets(self, tensors: list[StoredTensor]) -> dict[str, str]:
        """Return the name in the model of each tensor; its shape is checked where no conversion changes it."""
        targets = dict[str, str]()
        for tensor in tensors:
            key, pattern = self._target(tensor.name)
            expected = self._empty.get(key)
            if pattern is None and expected is not None and expected.shape != tensor.shape:
                raise CorruptFile(
                    f"{tensor.file}: {tensor.name} has the shape {list(tensor.shape)}, but by the config of {self._name} it is "
                    f"{list(expected.shape)}: a file of another model. Fetch config and weights of the same model."
                )
            targets[tensor.name] = key
        return targets

    def _refuse_misfits(self, tensors: list[StoredTensor], info: LoadStateDictInfo) -> None:
        wrong = {key: f"{list(found)} instead of {list(expected)}" for key, found, expected in info.mismatched_keys}
        wrong |= {key: " ".join(report.splitlines()[-2:]) for key, report in info.conversion_errors.items()}
        if wrong:
            sources = [tensor for tensor in tensors if self._targets[tensor.name] in wrong] or tensors
            raise CorruptFile(
                f"{', '.join(sorted({tensor.file.name for tensor in sources}))} in {self._folder} does not fit the config of "
                f"{self._name}: {'; '.join(f'{key} {reason}' for key, reason in wrong.items())}. Fetch config and weights of "
                "the same model."
            )
