"""Compile pieces of layers with torch's compiler, Inductor, and keep what it makes in the cache folder."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._inductor import compile as inductor_compile
from torch._inductor import config
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.fx import GraphModule

from flexgen_helm.cache_folder import cache_folder
from flexgen_helm.errors import FlexGenError
from flexgen_helm.model.compiled.program import Compiled

try:
    importlib.import_module("torch.utils.cpp_extension")  # Inductor imports it in the middle of compiling
except AssertionError:  # setuptools asks for a distutils of its own, where another library may have led to Python's
    os.environ["SETUPTOOLS_USE_DISTUTILS"] = "stdlib"
    importlib.import_module("torch.utils.cpp_extension")

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
VIEWS = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("view", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "expand", "split", "t", "alias")
)
"""Operators without a kernel, which a compiler only makes slower to call."""


def compile_piece(graph: GraphModule) -> Compiled:
    """Compile a graph of which the inputs have their form in ``meta["val"]``.

    Raises:
        FlexGenError: If the compiler fails.
    """
    operators = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    if all(getattr(operator, "overloadpacket", None) in VIEWS for operator in operators):
        forward: Compiled = graph.forward
        return forward
    inputs: list[Tensor | int | torch.SymInt | None] = [
        node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"
    ]
    try:
        with _own_cache(), torch.inference_mode(False), torch.no_grad():
            compiled: Compiled = inductor_compile(graph, inputs, options=_options())
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise FlexGenError(
            f"A layer cannot be compiled ({reason}). torch's compiler needs a C++ compiler such as g++ on a CPU, and Triton on "
            "a GPU. Install it, or leave compile_layers out."
        ) from error
    return compiled


def _options() -> dict[str, object]:
    """Settings under which equal graphs give equal bits: nothing is chosen by its time, and no process is started."""
    options: dict[str, object] = {"compile_threads": 1}
    if hasattr(config, "deterministic"):
        options["deterministic"] = True
    return options


@contextmanager
def _own_cache() -> Iterator[None]:
    """Keep kernels in the cache folder, unless the user names a folder; those for other numbers of threads are others."""
    before = os.environ.get(CACHE_VARIABLE)
    if before not in (None, default_cache_dir()):  # Inductor sets the default itself
        yield
        return
    os.environ[CACHE_VARIABLE] = str(cache_folder() / "compiled" / f"{torch.__version__}-{torch.get_num_threads()}")
    try:
        yield
    finally:
        os.environ[CACHE_VARIABLE] = before or default_cache_dir()
