"""Work on parts in as many threads as torch computes with. It gains only if the work releases the GIL, as compiled loops do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")


def in_threads(work: Callable[[Part], None], parts: Sequence[Part], *, most: int | None = None) -> None:
    """Do work on parts that do not touch each other's memory.

    Args:
        work: What is done with each part.
        parts: The parts, of about equal size.
        most: Most threads; None: as many as torch computes with.

    Raises:
        Exception: The first error of a part.
    """

    def run(part: Part) -> None:
        with torch.inference_mode():  # each thread has a mode of its own
            work(part)

    threads = min(most or torch.get_num_threads(), len(parts))
    if threads > 1:
        with ThreadPoolExecutor(threads, thread_name_prefix="flexgen-helm-work") as pool:
            list(pool.map(run, parts))
    else:
        for part in parts:
            run(part)
