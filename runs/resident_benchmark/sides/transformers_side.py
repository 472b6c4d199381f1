"""transformers, one prompt at a time: a forward for one new token, otherwise ``generate``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from flexgen_helm.runs.cpu_benchmark.contenders import Peer


def ways(task: dict[str, Any], stack: ExitStack) -> dict[str, Callable[[list[list[int]]], list[list[int]]]]:
    """Load the model; there is one way."""
    peer = Peer.load(task["folder"], dtype=getattr(torch, task["dtype"]))
    many = partial(peer.continuations, num_new_tokens=task["new_tokens"])
    return {"one at a time": peer.next_tokens if task["new_tokens"] == 1 else many}
