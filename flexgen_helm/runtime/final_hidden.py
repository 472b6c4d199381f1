"""Final hidden states of whole sequences, for whoever applies the output head apart from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, device, stack

from flexgen_helm.execution.interfaces import Executor, LayerHandler, Recording
from flexgen_helm.schedule.rows import LogitRequest, Row
from flexgen_helm.schedule.work import PromptWork, Scheduler

HOST = device("cpu")
LayerProbe = Callable[[int, int, Tensor], Tensor | None]
"""Is given j, the number of a row, and its hidden states ``[T, ...]`` on the host before layer j is applied, or behind the last
layer. What it returns takes their place; None: they stay."""


def final_hidden(
    scheduler: Scheduler,
    executor: Executor,
    sequences: Sequence[tuple[int, ...]],
    on_layer: LayerHandler | None = None,
) -> list[Tensor | None]:
    """Compute sequences up to the output head, as scored prompts.

    Args:
        scheduler: A scheduler without work.
        executor: Its executor.
        sequences: Token ids; each has at least two, and space for its K and V.
        on_layer: Called before each layer is applied to a row, and once behind the last one.

    Returns:
        For each sequence of T tokens the last layer's hidden states ``[T - 1, ...]`` of all positions but the last, on the
        host; None if some of its K or V are not finite.
    """
    found: dict[tuple[int, int], Tensor] = {}
    """By `Scores`, which the works keep alive, and by token in it: the hidden state that predicts the token."""

    def keep(requested: list[tuple[LogitRequest, Tensor]]) -> None:
        hidden = stack([hidden for _, hidden in requested]).to(HOST)
        for (request, _), state in zip(requested, hidden, strict=True):
            for scores, i in request.targets:
                found[id(scores), i] = state
                scores.logprobs[i] = 0.0  # so that the scheduler takes it for answered

    works = {ids: PromptWork(ids, score=True, continuations=[]) for ids in sequences}
    done: dict[PromptWork, Tensor | None] = {}
    scheduler.add(list(works.values()))
    try:
        while scheduler.has_work():
            sweep = scheduler.next_sweep()
            executor.run_to_head(sweep, keep, on_layer)
            for work in scheduler.end_sweep():
                done[work] = _of_work(work, found)
    except BaseException:
        scheduler.abandon()
        raise
    return [done[works[ids]] for ids in sequences]


def _of_work(work: PromptWork, found: dict[tuple[int, int], Tensor]) -> Tensor | None:
    if not work.finite:
        return None
    scored = [(id(node.scores), i) for node in work.node.path() for i in range(len(node.tokens))]
    return stack([found[key] for key in scored[1:]])


def probing(probe: LayerProbe) -> LayerHandler:
    """Return what shows a probe the hidden states of each row without its padding."""
    numbers: dict[int, tuple[int, Row]] = {}
    """By the `id` of a row, which is kept alive here."""

    def on_layer(j: int, row: Row, recording: Recording) -> None:
        k, _ = numbers.setdefault(id(row), (len(numbers), row))
        changed = probe(j, k, recording.tokens[: row.num_tokens].to(HOST))
        if changed is not None:
            assert recording.hidden is not None
            recording.hidden = recording.hidden.clone()  # which the layer before may use too
            recording.tokens[: row.num_tokens] = changed.to(recording.tokens)

    return on_layer
