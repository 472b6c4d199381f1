"""What every scheme of compressed weights can do. A scheme is chosen by name; see `flexgen_helm.compression.config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from flexgen_helm.compression.sensitivity import Sensitivity

Parts = dict[str, Tensor]
"""Tensors of one matrix by name: what is stored of it, or what was decided about it."""
MatrixKey = str
"""Names a matrix of the model: layer, tensor, and number of the expert, as ``3/mlp.experts.down_proj/7``."""


class Scheme(Protocol):
    """A way to store matrices ``[out, in]`` in fewer bits."""

    @property
    def needs_statistics(self) -> bool:
        """Whether it is fitted to what errors of the matrices do: see `flexgen_helm.compression.sensitivity`."""

    @property
    def own_text(self) -> bool:
        """Whether these statistics are those of text that the model writes, in place of random tokens."""

    def observe(self, weight: Tensor, known: Sensitivity) -> Parts:
        """Return what `solve` must know of a matrix.

        Args:
            weight: fp32 ``[out, in]``.
            known: What its errors do.
        """

    def solve(self, observed: Mapping[MatrixKey, Parts], weights: Mapping[MatrixKey, Tensor]) -> dict[MatrixKey, Parts]:
        """Decide about all matrices of the model together, so that they take the bits that were asked for.

        Args:
            observed: What `observe` returned for each matrix.
            weights: Reads each matrix, fp32 ``[out, in]``; fast in the order of the model, again and again.
        """

    def pack(self, weight: Tensor, decided: Parts) -> Parts:
        """Return the stored tensors of a matrix.

        Args:
            weight: fp32 ``[out, in]``.
            decided: What `solve` decided about it; nothing if the scheme needs no statistics.
        """

    def unpack(self, carried: Parts, target: Tensor) -> None:
        """Compute a matrix in fp32 and round it once into a target, on a GPU without waiting for it.

        Args:
            carried: The tensors that a link carries: those that are stored, unless the scheme is a `CodedScheme`.
            target: ``[out, in]`` in any floating dtype, on their device; numbers of a row are neighbours.
        """


class CodedScheme(Scheme, Protocol):
    """A scheme whose stored tensors only a CPU can decode, into the tensors that a link carries."""

    def carried(self, stored: Parts, shape: tuple[int, int]) -> Parts:
        """Return tensors of the sizes that are carried.

        Args:
            stored: Tensors of the sizes that are stored, on the meta device, where the result is too.
            shape: ``(out, in)``.
        """

    def decode(self, stored: Parts, carried: Parts) -> None:
        """Fill the carried tensors on the CPU.

        Raises:
            CorruptFile: If what is stored is damaged.
        """

    def load(self, stored: Parts, target: Tensor) -> None:
        """Do `decode` and `unpack` at once on the CPU, to the same bits.

        Raises:
            CorruptFile: If what is stored is damaged.
        """
