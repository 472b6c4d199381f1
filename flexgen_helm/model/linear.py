"""Linear layers of a model whose products another library computes, and whose weights may be packed for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from flexgen_helm.machine.matmul import WIDENED, Matmul, for_transposed, onednn_linear, packed, product_by
from flexgen_helm.machine.widened import Product

PRODUCT_NAME = "flexgen_helm_product"
"""Attribute of linear layers and modules with experts: the function that multiplies with their weights."""


class OneDNNLinear(nn.Linear):
    """A linear layer that multiplies with oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply ``[..., in]`` to ``[..., out]``."""
        return onednn_linear(input, self.weight, self.bias)


class PackedLinear(nn.Linear):
    """A linear layer that multiplies with oneDNN and has its weight packed."""

    packed: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A plain copy of the weight, for models whose code uses it itself."""
        return self.packed.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """Multiply ``[..., in]`` to ``[..., out]``."""
        return onednn_linear(input, self.packed, self.bias)


class WidenedLinear(nn.Linear):
    """A linear layer in 16 bits that multiplies in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply ``[..., in]`` to ``[..., out]``."""
        return product_of(self)(input, self.weight, self.bias)


class WidenedConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is ``[in, out]``, in 16 bits that are multiplied in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``[..., in]`` to ``[..., out]``."""
        return product_of(self)(x, self.weight.T, self.bias)


LINEAR_CLASSES: dict[Matmul, type[nn.Linear]] = {
    "torch": nn.Linear,
    "onednn": OneDNNLinear,
    "widened_torch": WidenedLinear,
    "widened_onednn": WidenedLinear,
}
TOKENWISE = (
    *(nn.Linear.forward, OneDNNLinear.forward, PackedLinear.forward, WidenedLinear.forward),
    *(Conv1D.forward, WidenedConv1D.forward),
)
"""Forwards that work token by token. Grouped and quantised linear layers have a forward of their own."""


def use_matmul(modules: Iterable[nn.Module], matmul: Matmul) -> None:
    """Make linear layers and experts multiply by a library; with "torch" they are as transformers made them.

    Args:
        modules: Modules with all their submodules. Subclasses of transformers' and others' are left as they are.
        matmul: The library.
    """
    product, transposed = product_by(matmul), product_by(for_transposed(matmul))
    for module in modules:
        if type(module) in LINEAR_CLASSES.values():
            module.__class__ = LINEAR_CLASSES[matmul]
            module.__dict__[PRODUCT_NAME] = product
        elif type(module) in (Conv1D, WidenedConv1D):
            module.__class__ = WidenedConv1D if matmul in WIDENED else Conv1D
            module.__dict__[PRODUCT_NAME] = transposed
        elif has_experts(module):
            module.__dict__[PRODUCT_NAME] = transposed if getattr(module, "is_transposed", False) else product


def has_experts(module: nn.Module) -> bool:
    """Return whether a module holds experts that transformers' interface can work in other ways."""
    return hasattr(module, "is_concatenated")


def product_of(module: nn.Module) -> Product:
    """Return the function that multiplies with the weights of a linear layer or of experts."""
    found: Product = module.__dict__.get(PRODUCT_NAME, linear)
    return found


def pack_weights(modules: Iterable[nn.Module], num_tokens: tuple[int, ...]) -> None:
    """Pack the weights of linear layers that use oneDNN, if no product changes by a bit.

    Weights that are used elsewhere too, such as an embedding's, and those that are elsewhere, stay as they are.

    Args:
        modules: Modules with all their submodules.
        num_tokens: Numbers of tokens with which the weights are multiplied.
    """
    found = list(modules)
    uses = Counter(id(parameter) for module in found for parameter in module._parameters.values())
    linears = [x for x in found if type(x) is OneDNNLinear and uses[id(x.weight)] == 1 and not x.weight.is_meta]
    samples = {(module.weight.shape, module.weight.dtype): module.weight for module in linears}
    if all(_same_bits(weight, count) for weight in samples.values() for count in num_tokens):
        for module in linears:
            _pack(module, max(num_tokens))


def plain_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the value of each parameter of a module, those that are packed as plain copies."""
    for path, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(part, PackedLinear) and name == "packed":
                yield f"{path}.weight".lstrip("."), part.weight
            else:
                yield f"{path}.{name}".lstrip("."), parameter.detach()


def _pack(module: nn.Module, num_tokens: int) -> None:
    weight = module._parameters.pop("weight")
    assert weight is not None
    module.__class__ = PackedLinear
    module.packed = nn.Parameter(packed(weight.detach(), num_tokens), requires_grad=False)


def _same_bits(weight: Tensor, num_tokens: int) -> bool:
    """Return whether a packed weight gives the same bits as the weight itself."""
    generator = torch.Generator().manual_seed(num_tokens)
    inputs = torch.randn(num_tokens, weight.shape[1], generator=generator).to(weight.dtype)
    return torch.equal(onednn_linear(inputs, weight), onednn_linear(inputs, packed(weight, num_tokens)))
