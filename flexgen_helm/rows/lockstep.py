"""Calls of one layer, side by side: each for a sequence of its own, and all rest where they need the same weights.

A decoded token is a vector, and every vector that meets a matrix reads the whole of it from memory. So the calls of single
rows rest where they reach a linear layer or a mixture of experts; when all of them rest, those that wait for the same module
meet its weights together, in slices of a fixed number of tokens, which makes a token's bits independent of its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flexgen_helm.model.experts import sliced_experts

TOKENWISE = (nn.Linear.forward, Conv1D.forward)
"""Not subclasses with a forward of their own: grouped ones do not work token by token."""
Work = Callable[..., Tensor]
"""Tensors with the same leading shape in, a tensor with that leading shape out."""


class _Request(NamedTuple):
    """What a call rests for."""

    work: Work
    inputs: tuple[Tensor, ...]


def run_in_lockstep(layer: nn.Module, calls: Sequence[Callable[[], None]], *, size: int) -> None:
    """Run calls that all go through one layer.

    Args:
        layer: The module whose linear layers and experts are worked for all calls at once.
        calls: Each for one row.
        size: Tokens in a slice; what is missing in the last is padding.
    """
    with _resting(layer):
        rows = [greenlet(call) for call in calls]
        try:
            waiting: dict[greenlet, _Request] = {}
            for row in rows:
                _switch(row, None, waiting)
            while waiting:
                answers = _answers(waiting, size)
                waiting = {}
                for row, output in answers.items():
                    _switch(row, output, waiting)
        finally:
            for row in rows:
                if row and not row.dead:
                    row.throw()  # after an error: what rests holds tensors


def _switch(row: greenlet, answer: Tensor | None, waiting: dict[greenlet, _Request]) -> None:
    request = row.switch() if answer is None else row.switch(answer)
    if not row.dead:
        waiting[row] = request


def _answers(waiting: dict[greenlet, _Request], size: int) -> dict[greenlet, Tensor]:
    """Work all requests, those for the same module together; the answers are in the order of the requests."""
    answers: dict[greenlet, Tensor] = {}
    for work in dict.fromkeys(request.work for request in waiting.values()):
        rows = [row for row, request in waiting.items() if request.work is work]
        inputs = [waiting[row].inputs for row in rows]
        answers.update(zip(rows, _worked_together(work, inputs, size), strict=True))
    return {row: answers[row] for row in waiting}


def _worked_together(work: Work, inputs: list[tuple[Tensor, ...]], size: int) -> list[Tensor]:
    """Outputs of ``work`` for each of several calls' inputs ``[..., features]``, worked in slices of ``size`` tokens."""
    shapes = [first.shape[:-1] for first, *_ in inputs]
    tokens = [torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in column]) for column in zip(*inputs, strict=True)]
    count = len(tokens[0])
    padding = -count % size
    slices = zip(*(nn.functional.pad(column, (0, 0, 0, padding)).split(size) for column in tokens), strict=True)
    output = torch.cat([work(*columns) for columns in slices])[:count]
    parts = output.split([shape.numel() for shape in shapes])
    return [part.reshape(*shape, output.shape[-1]) for part, shape in zip(parts, shapes, strict=True)]


@contextmanager
def _resting(layer: nn.Module) -> Iterator[None]:
    """Make a layer's modules with large weights hand their work to whoever runs the calls."""
    hub = getcurrent()
    patched: list[nn.Module] = []
    for module in layer.modules():
        work = _joint_work(module)
        if work is not None:
            module.__dict__["forward"] = _rest(work, hub)
            patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.__dict__["forward"]


def _joint_work(module: nn.Module) -> Work | None:
    """What a module does to any number of tokens, if its weights are worth meeting together."""
    if type(module).forward in TOKENWISE:
        own: Work = module.forward
        return own
    if hasattr(module, "is_concatenated"):  # set by transformers on experts that its interface can work in other ways
        return lambda tokens, experts, weights: sliced_experts(module, tokens, experts, weights)
    return None


def _rest(work: Work, hub: greenlet) -> Callable[..., Any]:
    def forward(*inputs: Tensor) -> Any:
        return work(*inputs) if getcurrent() is hub else hub.switch(_Request(work, inputs))

    return forward
