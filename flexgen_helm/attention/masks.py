"""Masks of models whose rows hold tokens of many sequences: predicates over positions in place of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from flexgen_helm.errors import UnsupportedModel


@dataclass(frozen=True)
class MaskRule:
    """The model's own mask, as a predicate over positions of one sequence.

    Layers with the same mask hold the same object, so that a row's attention is planned once for all of them. Whatever uses it
    as the tensor that a model expects raises `UnsupportedModel`.
    """

    allowed: Callable[[Tensor, Tensor], Tensor]
    """(query positions ``[M, 1]``, key positions ``[M, L]`` or ``[1, L]``) -> bool ``[M, L]``."""
    causal_only: bool
    """Whether it is plain causality, so that chunks before a query's own are seen whole."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def __getitem__(self, index: object) -> NoReturn:
        self._refuse()

    def __radd__(self, other: object) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedModel("it uses the attention mask as a tensor; packed rows have none")
