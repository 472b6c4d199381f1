"""The queue of scoring work: what a block holds and where it is cut, against a plain search over all places to cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexgen_helm.schedule.rows import Continuation
from flexgen_helm.schedule.scoring import CUT_FROM, ScoringQueue
from flexgen_helm.schedule.tree import build_tree
from flexgen_helm.schedule.work import PromptWork

Tokens = tuple[int, ...]
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=12, unique=True)


def works_of(prompts: list[Tokens]) -> list[PromptWork]:
    """Work that asks for a first token, in the order of the tree."""
    works = [PromptWork(prompt, False, [Continuation(1)]) for prompt in sorted(prompts)]
    for work, node in zip(works, build_tree([work.tokens for work in works]), strict=True):
        work.node = node
    return works


def shared(a: Tokens, b: Tokens) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def cost(prompts: list[Tokens]) -> int:
    """Tokens to compute: distinct prefixes."""
    return len({prompt[: i + 1] for prompt in prompts for i in range(len(prompt))})


@given(PROMPTS, st.integers(1, 60), st.booleans())
def test_a_block_is_as_long_as_its_budget_and_cut_where_least_is_shared(
    prompts: list[Tokens], budget: int, alone: bool
) -> None:
    works = works_of(prompts)
    queue = ScoringQueue(lambda work: True)
    queue.extend(works)
    block, answered = queue.take(budget, alone=alone)
    assert not answered
    assert [*block, *queue] == works
    tokens = [work.tokens for work in works]
    fits = [count for count in range(len(works) + 1) if cost(tokens[:count]) <= budget]
    most = max(fits) if max(fits) or not alone else 1
    if most == len(works):
        assert len(block) == most
        return
    places = [i for i in range(1, most + 1) if i == most or cost(tokens[:i]) >= CUT_FROM * budget]
    assert len(block) <= most
    assert not most or shared(tokens[len(block) - 1], tokens[len(block)]) == min(
        shared(tokens[i - 1], tokens[i]) for i in places
    )


@given(PROMPTS, st.integers(1, 8))
def test_blocks_together_are_all_work_in_order(prompts: list[Tokens], budget: int) -> None:
    works = works_of(prompts)
    queue = ScoringQueue(lambda work: True)
    queue.extend(works)
    taken: list[PromptWork] = []
    while queue:
        block = queue.take(budget, alone=True).works
        assert block
        taken += block
    assert taken == works


def test_a_prompt_that_is_too_long_waits_for_a_sweep_of_its_own() -> None:
    works = works_of([(1,) * 10, (2,)])
    queue = ScoringQueue(lambda work: True)
    queue.extend(works)
    assert queue.take(5, alone=False).works == []
    assert queue.take(5, alone=True).works == works[:1]
    assert queue.take(0, alone=False).works == []
    assert list(queue) == works[1:]


def test_work_that_was_answered_meanwhile_is_not_computed() -> None:
    works = works_of([(1,), (2,), (3,)])
    queue = ScoringQueue(lambda work: True)
    queue.extend(works)
    for work in works[::2]:
        work.continuations[0].done = True
    assert queue.take(10, alone=True) == ([works[1]], [works[0], works[2]])
    assert not queue


def test_a_block_ends_where_memory_does() -> None:
    works = works_of([(1,), (2,), (3,)])
    queue = ScoringQueue(lambda work: work is works[0])
    queue.extend(works)
    assert queue.take(10, alone=True).works == works[:1]
    assert list(queue) == works[1:]
    queue.clear()
    assert not queue
