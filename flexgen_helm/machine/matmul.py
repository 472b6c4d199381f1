"""Libraries for the matrix products of linear layers: torch's own choice, or oneDNN, and which is faster on this machine.

On a CPU torch multiplies fp32 matrices with MKL, whose kernels know no AVX-512 on processors of AMD: oneDNN is 1.7 to 2.6 times
faster there. oneDNN can also keep a weight in the layout that its kernels read, *packed*, without another bit in any product.
Either can multiply 16 bits *widened* to fp32 (`flexgen_helm.machine.widened`), which is faster on processors without AVX-512.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from flexgen_helm.cache_folder import cache_folder, write_first
from flexgen_helm.machine.identity import machine_identity
from flexgen_helm.machine.widened import WIDENED_DTYPES, Product, WidenedProduct

logger = logging.getLogger(__name__)

Matmul = Literal["torch", "onednn", "widened_torch", "widened_onednn"]
MEASURED_SHAPE = (1536, 576)
MEASURED_TOKENS = (64, 512)
ROUNDS = 40
MARGIN = 1.1
"""oneDNN is chosen unless it is slower by this factor unpacked: packed weights make up for less. To widen for, it is chosen if
it is faster by this factor."""
WIDENED_MARGIN = 1.5
"""Products are widened only if they are faster by this factor, so that equal machines choose alike. Where a processor has no
instructions for 16 bits it is 5 to 10, and where it has them less than 1."""
FIRST_ROUNDS = 5
HOPELESS = 3.0
"""A library that takes so many times the shortest time after the first rounds is measured no further."""


def onednn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply with oneDNN, as torch's compiler does.

    Args:
        inputs: ``[..., in]``.
        weight: ``[out, in]``, contiguous or `packed`.
        bias: ``[out]``, or None.

    Returns:
        ``[..., out]``.
    """
    if inputs.numel() == inputs.shape[-1]:
        # The kernels for one token give packed weights other bits, so it is never alone.
        return onednn_linear(inputs.reshape(1, -1).expand(2, -1), weight, bias)[0].view(*inputs.shape[:-1], -1)
    output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return output


PRODUCTS: dict[Matmul, Product] = {"torch": linear, "onednn": onednn_linear}
"""Products of matrices as they are."""
WIDENED: dict[Matmul, Matmul] = {"widened_torch": "torch", "widened_onednn": "onednn"}
"""Products of 16-bit matrices by one in fp32."""


def product_by(matmul: Matmul) -> Product:
    """Return the product of a library. Two threads must not use it at the same time."""
    return WidenedProduct(PRODUCTS[WIDENED[matmul]]) if matmul in WIDENED else PRODUCTS[matmul]


def for_transposed(matmul: Matmul) -> Matmul:
    """Return the library for weights whose columns lie side by side, which oneDNN's product does not read."""
    return "widened_torch" if matmul in WIDENED else "torch"


def packed(weight: Tensor, num_tokens: int) -> Tensor:
    """Return a weight ``[out, in]`` in the layout that oneDNN's kernels read; only `onednn_linear` can use it.

    Args:
        weight: The weight.
        num_tokens: The usual number of tokens of a product. Others are served as well.
    """
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, num_tokens)
    return result


def faster_matmul(device: torch.device, dtype: torch.dtype) -> Matmul:
    """Return the library that is faster for a dtype on this machine. It is measured once, and kept in the cache folder.

    Where both are about equally fast, two measurements may disagree. So of several processes that measure at once, all use what
    the first one wrote.
    """
    libraries = serving(dtype) if device.type == "cpu" else ("torch",)
    if len(libraries) == 1:
        return "torch"
    measured = {"torch": torch.__version__, "dtype": str(dtype), **machine_identity(device)}
    if dtype in WIDENED_DTYPES:
        measured["libraries"] = libraries  # what an earlier version measured of 16 bits lacks some
    file = cache_folder() / "matmul" / f"{sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:32]}.json"
    kept = _kept(file)
    if kept is not None:
        return kept
    seconds = measure_products(dtype)
    with suppress(OSError):
        if _kept(file) is None:
            file.unlink(missing_ok=True)  # one that cannot be read
        write_first(file, json.dumps({**measured, "seconds": seconds}, indent=1))
    chosen = _kept(file) or chosen_of(seconds)
    figures = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in seconds.items())
    logger.info("matrix products in %s by %s: the same ones took %s", dtype, chosen, figures)
    return chosen


def _kept(file: Path) -> Matmul | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return chosen_of(json.loads(file.read_text(encoding="utf-8"))["seconds"])
    return None


def measure_products(dtype: torch.dtype) -> dict[str, float]:
    """Return the seconds that each library takes for the same products on the CPU, the shortest of many rounds."""
    weight = torch.rand(MEASURED_SHAPE).to(dtype)
    inputs = [torch.rand(count, MEASURED_SHAPE[1]).to(dtype) for count in MEASURED_TOKENS]
    products = {name: product_by(name) for name in serving(dtype)}
    seconds: dict[str, float] = dict.fromkeys(products, math.inf)
    with torch.inference_mode():
        for turn in range(ROUNDS):
            for name, product in products.items():
                if turn >= FIRST_ROUNDS and seconds[name] > HOPELESS * min(seconds.values()):
                    continue
                begun = time.perf_counter()
                for x in inputs:
                    product(x, weight, None)
                seconds[name] = min(seconds[name], time.perf_counter() - begun)
    return seconds


def chosen_of(seconds: Mapping[str, float]) -> Matmul:
    """Return the library that is chosen for measured seconds of each.

    Raises:
        KeyError: If torch was not measured.
    """
    plain: Matmul = "onednn" if seconds.get("onednn", math.inf) < MARGIN * seconds["torch"] else "torch"
    by_torch, by_onednn = (seconds.get(name, math.inf) for name in WIDENED)
    # No weight is packed that is widened for each product, so nothing speaks for oneDNN but its speed.
    widened: Matmul = "widened_onednn" if MARGIN * by_onednn < by_torch else "widened_torch"
    return widened if WIDENED_MARGIN * min(by_torch, by_onednn) < seconds[plain] else plain


def serving(dtype: torch.dtype) -> tuple[Matmul, ...]:
    """Return the libraries that multiply a dtype on the CPU."""
    plain: tuple[Matmul, ...] = tuple(name for name in PRODUCTS if name == "torch" or _onednn_serves(dtype))
    if dtype not in WIDENED_DTYPES:
        return plain
    return *plain, *(name for name, by in WIDENED.items() if by == "torch" or _onednn_serves(torch.float32))


def _onednn_serves(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32
