"""How fast one core unpacks stored weights on this CPU, in 1e9 weights per second of processor time.

Weights are random; a quarter of the columns is wide, as in models. The best of several rounds, outputs compared by bit with the
plain computation. Cost: half a minute, most of it compilation.

Command: ``python -m flexgen_helm.runs.quantizers.unpack_rates --json result.json``
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from flexgen_helm.compression import columns, minmax
from flexgen_helm.compression.allocation import LADDERS, allocate, column_errors
from flexgen_helm.compression.unpack_kernel import unpack_columns, unpack_minmax
from flexgen_helm.runs.command_line import add_json, make_parser, prepare_libraries, reports_errors, write_json

ROUNDS = 30
SHAPES = ((1536, 576), (576, 1536), (4096, 4096))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stored_forms(weight: Tensor) -> dict[str, tuple[Callable[[Tensor], None], Tensor]]:
    """Return what writes each stored form to a target, and the matrix that it must write."""
    forms: dict[str, tuple[Callable[[Tensor], None], Tensor]] = {}
    sensitivity = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) ** 4
    for bits in (2, 3, 4, 8):
        codes = minmax.MinMax(bits).quantize(weight)
        forms[f"w{bits}-minmax"] = (lambda target, codes=codes: unpack_minmax(codes, target)), minmax.dequantize(codes)  # type: ignore[misc]
        shape = (weight.shape[0], weight.shape[1])
        (widths,) = allocate([column_errors(weight, sensitivity)], [shape], bits)
        stored = columns.quantize(weight, widths, LADDERS[bits])
        forms[f"w{bits}"] = (lambda target, stored=stored: unpack_columns(stored, target)), columns.dequantize(stored)  # type: ignore[misc]
    return forms


def rate(write: Callable[[Tensor], None], target: Tensor) -> float:
    """Return 1e9 weights per second of processor time."""
    best = math.inf
    for _ in range(ROUNDS):
        begun = time.process_time()
        write(target)
        best = min(best, time.process_time() - begun)
    return target.numel() / best / 1e9


@reports_errors
def main() -> int:
    """Measure all forms and print a table."""
    parser = make_parser("quantizers.unpack_rates", __doc__)
    add_json(parser)
    arguments = parser.parse_args()
    prepare_libraries(1)
    results = []
    print("scheme     shape         " + "".join(f"{str(dtype).removeprefix('torch.'):>10}" for dtype in DTYPES))
    for shape in SHAPES:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 30
        for name, (write, expected) in stored_forms(weight).items():
            rates = {}
            for dtype in DTYPES:
                target = torch.empty(shape, dtype=dtype)
                write(target)
                assert torch.equal(target, expected.to(dtype)), name
                rates[str(dtype).removeprefix("torch.")] = rate(write, target)
            results.append({"scheme": name, "shape": shape, "rates": rates})
            print(f"{name:9}  {shape[0]:4} x {shape[1]:<6} " + "".join(f"{x:10.2f}" for x in rates.values()), flush=True)
    write_json(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
