"""Convert the tensors of a checkpoint into those of a model, with transformers' own conversion, one part at a time.

transformers' `from_pretrained` reads ahead of its conversion without a bound: a mixture of experts needs the memory of the
model and six more layers.
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
from flexgen_helm.loading.first_layers import FewTokens
from flexgen_helm.loading.wrapped_names import renaming_advice, shorter_names


def first_rows(stored: Iterable[StoredTensor], few: FewTokens) -> list[StoredTensor] | None:
    """Cut the stored tensors that have one row for each token to the rows of the first tokens.

    Args:
        stored: The tensors of a checkpoint with the whole vocabulary.
        few: The model of few tokens.

    Returns:
        All tensors, some of them cut. None if one of the model's tables is not stored as it is, but made by a conversion, so
        that it cannot be cut in the files.
    """
    names, tensors, found = _Names(few.model), list[StoredTensor](), set[str]()
    shapes = set(few.tables.values())
    for tensor in stored:
        # Only tensors of these shapes are looked up: a checkpoint of experts has 100,000 names.
        key, pattern = names.target(tensor.name) if tensor.shape in shapes else ("", None)
        if key in few.tables:
            if pattern is not None:
                return None
            found.add(key)
            tensor = tensor.first_rows(len(names.empty[key]))
        tensors.append(tensor)
    return tensors if few.tables.keys() <= found | few.model.all_tied_weights_keys.keys() else None


class _Names:
    """Translates the names of a checkpoint's tensors into names of a model's tensors, by transformers' conversion mapping."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.mapping = cast(Any, get_model_conversion_mapping(model))
        self.empty: dict[str, torch.Tensor] = model.state_dict()
        self._prefix = model.base_model_prefix
        self._renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]

    def target(self, name: str) -> tuple[str, str | None]:
        """Return the name in the model of a tensor of the files, and the pattern of the conversion that makes it, if any."""
        key, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.empty)
        return (name, None) if key not in self.empty and name in self.empty else (key, pattern)


class Checkpoint:
    """The files of a checkpoint as a `flexgen_helm.loading.assembly.WeightSource` for a model on the meta device."""

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
        """Find the model's tensor for each tensor of the files; nothing is read.

        Args:
            name: The model's name, for messages.
            folder: The folder of the checkpoint, for messages.
            model: The model to fill, on the meta device.
            stored: The tensors that the files hold.
            dtype: The dtype of the weights. transformers keeps some modules in float32.
            partly: Whether the files may hold tensors that the model lacks; these are skipped.

        Raises:
            CorruptFile: If a tensor's shape differs from that in the model.
        """
        self._name, self._folder, self._model = name, folder, model
        self._names = _Names(model)
        plan, mapping = model._get_dtype_plan(dtype), self._names.mapping
        self._settings = LoadStateDictConfig(
            pretrained_model_name_or_path=str(folder), dtype=dtype, dtype_plan=plan, weight_mapping=mapping
        )
        self._empty = self._names.empty
        tensors = sorted(stored, key=lambda tensor: dot_natural_key(tensor.name))
        self._targets = self._checked_targets(tensors)
        if partly:
            tensors = [tensor for tensor in tensors if self._targets[tensor.name] in self._empty]
        self._parts = group_by_layer(tensors, self._targets.__getitem__)
        self.unexpected: set[str] = set()
        self.num_bytes = sum(tensor.num_bytes for tensor in tensors)
        """Bytes of all tensors that can be read."""
        self.on_read: Callable[[int], object] = int
        """Called after each part with the number of bytes that were read."""

    def parts(self) -> list[str]:
        """Return the parts for which the files hold tensors, in the natural order of the tensors' names."""
        return list(self._parts)

    def fill(self, part: str) -> set[str]:
        """Read and convert the tensors of a part, and put them into the model, on the CPU.

        Args:
            part: A part of the model. If the files hold none of its tensors, nothing is filled.

        Returns:
            Names of the model's tensors that were filled.

        Raises:
            CorruptFile: If the tensors do not fit the model, or a file became shorter since its header was checked.
        """
        tensors = self._parts.get(part, [])
        state = {tensor.name: tensor for tensor in tensors}
        info: LoadStateDictInfo = convert_and_load_state_dict_in_model(self._model, state, self._settings)[0]
        self._refuse_misfits(tensors, info)
        self.unexpected |= info.unexpected_keys
        self.on_read(sum(tensor.num_bytes for tensor in tensors))
        return self._empty.keys() - info.missing_keys

    def lacks(self, names: list[str]) -> CorruptFile:
        """Return the error for tensors of the model that no file holds, with the most likely remedy."""
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
        """Return a remedy if the files hold the lacking tensors under longer names."""
        for name, target in self._targets.items():
            if target not in self._empty:
                for found in shorter_names(name):
                    if self._names.target(found.short)[0] in lacking:
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

    def _checked_targets(self, tensors: list[StoredTensor]) -> dict[str, str]:
        """Return the name in the model of each tensor, and check the shapes of those that no conversion changes."""
        targets = dict[str, str]()
        for tensor in tensors:
            key, pattern = self._names.target(tensor.name)
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
