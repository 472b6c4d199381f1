"""Run two engines over the same windows, a block at a time.

A block of windows goes through the reference, then through the candidate; both leave final hidden states. Then both output
heads are applied slice by slice, and no logits outlive a slice. So memory is bounded by the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexgen_helm.errors import FlexGenError
from flexgen_helm.fidelity.positions import Positions, compare_logits
from flexgen_helm.fidelity.windows import Window
from flexgen_helm.runtime.engine import Engine

BLOCK_TOKENS = 8192
"""Tokens whose hidden states are in memory at a time, once for each model."""


def compare(
    reference: Engine,
    candidate: Engine,
    windows: Sequence[Window],
    *,
    block_tokens: int = BLOCK_TOKENS,
    on_block: Callable[[int], None] | None = None,
) -> Positions:
    """Compare what two models predict for the same tokens.

    Args:
        reference: Its tokens are those of the windows.
        candidate: The same object as the reference gives the difference of two passes, which is 0.
        windows: At least one.
        block_tokens: Most tokens of a block; a longer window is a block of its own.
        on_block: Told the positions compared so far, after each block.

    Raises:
        FlexGenError: If the vocabularies differ.
        InvalidJob: If a window is longer than a model's context, or numbers are not finite.
    """
    check_vocabularies(reference, candidate)
    parts: list[Positions] = []
    for block in blocks(windows, block_tokens):
        hidden = [final_states(engine, block) for engine in (reference, candidate)]
        parts.append(compare_states(reference, candidate, hidden, block))
        if on_block is not None:
            on_block(sum(map(len, parts)))
    return Positions.joined(parts)


def groups_of(windows: Sequence[Window]) -> NDArray[np.int64]:
    """Return the group of each position that `compare` returns, ``[N]``."""
    return np.repeat([window.group for window in windows], [len(window.targets) for window in windows])


def blocks(windows: Sequence[Window], most: int) -> Iterator[list[Window]]:
    """Cut windows, in order, into blocks of at most so many tokens, but of at least one window."""
    block: list[Window] = []
    for window in windows:
        if block and sum(len(each.tokens) for each in block) + len(window.tokens) > most:
            yield block
            block = []
        block.append(window)
    if block:
        yield block


def check_vocabularies(reference: Engine, candidate: Engine) -> None:
    """Check that equal token ids mean equal text.

    Raises:
        FlexGenError: If the vocabularies differ.
    """
    sizes = reference.vocab_size, candidate.vocab_size
    known = [None if engine.tokenizer is None else engine.tokenizer.get_vocab() for engine in (reference, candidate)]
    if sizes[0] != sizes[1]:
        raise FlexGenError(f"The vocabularies differ: {sizes[0]} and {sizes[1]} tokens. Compare models of the same vocabulary.")
    if None not in known and known[0] != known[1]:
        raise FlexGenError(
            "The vocabularies differ: the tokenizers of the two models number texts in other ways. Compare models of the same "
            "tokenizer."
        )


def final_states(engine: Engine, windows: Sequence[Window]) -> Tensor:
    """Return the hidden states behind the last layer that predict the tokens that count, ``[N, ...]``.

    Raises:
        InvalidJob: If a window is longer than the model's context, or numbers are not finite.
    """
    found = engine.final_hidden([window.tokens for window in windows])
    return torch.cat([hidden[window.first - 1 :] for window, hidden in zip(windows, found, strict=True)])


def compare_states(reference: Engine, candidate: Engine, hidden: Sequence[Tensor], windows: Sequence[Window]) -> Positions:
    """Compare what two models predict, from what `final_states` returned for each of them.

    Args:
        reference: A model.
        candidate: Another one, of the same vocabulary.
        hidden: Of the reference and of the candidate, ``[N, ...]`` each.
        windows: Those of both.
    """
    targets = torch.tensor([token for window in windows for token in window.targets])
    size = reference.policy.gpu_batch_size
    slices = zip(hidden[0].split(size), hidden[1].split(size), targets.split(size), strict=True)
    with ExitStack() as stack:
        first = stack.enter_context(reference.head())
        second = first if candidate is reference else stack.enter_context(candidate.head())
        return Positions.joined([compare_logits(first(a), second(b), right) for a, b, right in slices])
