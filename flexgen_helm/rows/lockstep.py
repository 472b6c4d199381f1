"""Lockstep: runs several calls of one layer, each for its own sequence, and multiplies with each weight once for all of them.

A product of one decoded token with a matrix reads the whole matrix from memory. So each call is suspended when it reaches a
linear layer or a mixture of experts. When all calls are suspended, those that wait for the same module are computed together,
in slices of a fixed number of tokens. The fixed number makes a token's bits independent of its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from flexgen_helm.model.experts import sliced_experts
from flexgen_helm.model.linear import TOKENWISE, has_experts

Work = Callable[..., Tensor]
"""A function from tensors ``[..., features]`` with equal leading shape to one tensor with that leading shape."""


class _Request(NamedTuple):
    """Work for which a call is suspended, with its inputs."""

    work: Work
    inputs: tuple[Tensor, ...]


def run_in_lockstep(layer: nn.Module, calls: Sequence[Callable[[], None]], *, size: int) -> None:
    """Run calls of one layer and compute its linear layers and experts for all calls at once.

    Args:
        layer: The layer that all calls run.
        calls: One call for each row; takes and returns nothing.
        size: Tokens in a slice; the last slice is padded to it.
    """
    with _suspending_forwards(layer):
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
                    row.throw()  # after an error: suspended calls hold tensors


def _switch(row: greenlet, answer: Tensor | None, waiting: dict[greenlet, _Request]) -> None:
    request = row.switch() if answer is None else row.switch(answer)
    if not row.dead:
        waiting[row] = request


def _answers(waiting: dict[greenlet, _Request], size: int) -> dict[greenlet, Tensor]:
    """Compute all requests, those for the same module together; the answers are in the order of the requests."""
    answers: dict[greenlet, Tensor] = {}
    for work in dict.fromkeys(request.work for request in waiting.values()):
        rows = [row for row, request in waiting.items() if request.work is work]
        inputs = [waiting[row].inputs for row in rows]
        answers.update(zip(rows, _worked_together(work, inputs, size), strict=True))
    return {row: answers[row] for row in waiting}


def _worked_together(work: Work, inputs: list[tuple[Tensor, ...]], size: int) -> list[Tensor]:
    """Return the output of ``work`` for each call's inputs ``[..., features]``, computed in slices of ``size`` tokens."""
    shapes = [first.shape[:-1] for first, *_ in inputs]
    tokens = [torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in column]) for column in zip(*inputs, strict=True)]
    count = len(tokens[0])
    padding = -count % size
    slices = zip(*(nn.functional.pad(column, (0, 0, 0, padding)).split(size) for column in tokens), strict=True)
    output = torch.cat([work(*columns) for columns in slices])[:count]
    parts = output.split([shape.numel() for shape in shapes])
    return [part.reshape(*shape, output.shape[-1]) for part, shape in zip(parts, shapes, strict=True)]


@contextmanager
def _suspending_forwards(layer: nn.Module) -> Iterator[None]:
    """Make a layer's modules with large weights suspend their call and hand their work to this greenlet."""
    hub = getcurrent()
    patched: list[nn.Module] = []
    for module in layer.modules():
        work = _joint_work(module)
        if work is not None:
            module.__dict__["forward"] = _suspending_forward(work, hub)
            patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.__dict__["forward"]


def _joint_work(module: nn.Module) -> Work | None:
    """Return the function that a module applies to any number of tokens; None if its weights are small."""
    if type(module).forward in TOKENWISE:
        own: Work = module.forward
        return own
    if has_experts(module):
        return lambda tokens, experts, weights: sliced_experts(module, tokens, experts, weights)
    return None


def _suspending_forward(work: Work, hub: greenlet) -> Callable[..., Any]:
    def forward(*inputs: Tensor) -> Any:
        return work(*inputs) if getcurrent() is hub else hub.switch(_Request(work, inputs))

    return forward
