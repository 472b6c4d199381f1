"""The tensors of a layer that are quantised: weights of linear layers, of Conv1D, and of fused experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.model.linear import LINEAR_CLASSES, has_experts


@dataclass(frozen=True)
class MatrixTensor:
    """A tensor of a layer that holds a matrix, or one for each expert.

    Attributes:
        module: Name of the module in the layer, such as "self_attn.q_proj".
        parameter: Name of the tensor in the module.
        transposed: Whether a matrix is stored as ``[in, out]``.
    """

    module: str
    parameter: str
    transposed: bool

    @property
    def name(self) -> str:
        """Name of the tensor in the layer."""
        return f"{self.module}.{self.parameter}"

    def matrices(self, tensor: Tensor) -> Tensor:
        """View the tensor as its n matrices: ``[n, out, in]``."""
        stacked = tensor if tensor.dim() == 3 else tensor[None]
        return stacked.transpose(1, 2) if self.transposed else stacked

    def values(self, j: int, layer: nn.Module) -> Tensor:
        """Return the matrices of layer j, fp32 ``[n, out, in]``.

        Raises:
            UnsupportedModel: If a weight is infinite or NaN.
        """
        values = self.matrices(layer.get_parameter(self.name).detach()).float()
        if not bool(values.isfinite().all()):
            raise UnsupportedModel(
                f"{self.name} of layer {j} holds infinities or NaN, which cannot be quantised. The checkpoint is damaged, or "
                "its values overflow: fetch it again, or use it without compression."
            )
        return values


def matrix_tensors(layer: nn.Module) -> list[MatrixTensor]:
    """Return the tensors of a layer that are quantised; they may be on the meta device.

    Embeddings, norms, and linear layers with a forward of their own are none of them, nor are tensors that two modules share.
    """
    uses: dict[int, int] = {}
    for module in layer.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found = [x for name, module in layer.named_modules() for x in _of_module(name, module)]
    return [x for x in found if uses[id(layer.get_parameter(x.name))] == 1]


def _of_module(name: str, module: nn.Module) -> list[MatrixTensor]:
    if type(module) in LINEAR_CLASSES.values():
        return [MatrixTensor(name, "weight", False)]
    if isinstance(module, Conv1D):
        return [MatrixTensor(name, "weight", True)]
    if has_experts(module):
        transposed = bool(module.is_transposed)
        return [
            MatrixTensor(name, key, transposed) for key, value in module.named_parameters(recurse=False) if value.dim() == 3
        ]
    return []
