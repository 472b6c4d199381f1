"""Features: what the closed form needs to know of a workload. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flexgen_helm.kv_cache.pages import PAGE_TOKENS, num_pages
from flexgen_helm.policy.planner.loads import earlier_keys
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.schedule.page_tables import continuation_pages
from flexgen_helm.schedule.tree import Node, build_tree

STEP_PARTS = 12
"""Parts into which completions are divided by their number of steps."""


@dataclass(frozen=True)
class Features:
    """Sums over a workload. Work that generates at most one token is scoring work: it keeps no K and V between sweeps.

    Attributes:
        prompt_tokens: Prompt tokens that are computed; what prompts share counts once.
        kept_tokens: Of these, the tokens whose K and V are kept: those of prompts that generate more than one token.
        sequences: Completions of more than one token.
        steps: Decode steps of all of them: a completion's first token comes from its prompt.
        longest: Most steps of one of them.
        shortest: Least steps of one of them.
        step_shares: For some numbers of steps, in increasing order, the share of the completions that take so many, about.
        context: Tokens to which a decode step attends, on average.
        earlier: Of these, the tokens in earlier chunks than its own, on average: attention reads whole chunks.
        sequence_tokens: Tokens for whose K and V a completion needs memory of its own, in whole pages, on average.
        shared_tokens: Tokens that several completions read and that are kept once.
        earlier_keys: Pairs of a computed prompt token and a key of an earlier chunk than its own.
        new_tokens: New tokens of all work.
        scored_positions: Positions of prompts whose logits are needed.
    """

    prompt_tokens: int
    kept_tokens: int
    sequences: int
    steps: int
    longest: int
    shortest: int
    step_shares: tuple[tuple[float, int], ...]
    context: float
    earlier: float
    sequence_tokens: float
    shared_tokens: int
    earlier_keys: int
    new_tokens: int
    scored_positions: int

    @classmethod
    def of(cls, workload: Workload) -> Features:
        """Sum up a workload; its prompts are merged into a prefix tree as the scheduler merges them."""
        prompts = workload.prompts
        ends = build_tree([prompt.tokens for prompt in prompts])
        users: dict[Node, int] = {}
        kept: set[Node] = set()
        scored: set[Node] = set()
        for prompt, end in zip(prompts, ends, strict=True):
            long = sum(count > 1 for count in prompt.new_tokens)
            for node in end.path():
                users[node] = users.get(node, 0) + long
                if long:
                    kept.add(node)
                if prompt.score:
                    scored.add(node)
        completions = [(len(prompt.tokens), count) for prompt in prompts for count in prompt.new_tokens if count > 1]
        steps = sum(count - 1 for _, count in completions)
        # Step i of a completion attends to its prompt and the i tokens before, its own among them (flexgen.md 2.2: s + n / 2).
        read = sum((count - 1) * length + count * (count - 1) // 2 for length, count in completions)
        earlier = sum(earlier_keys(length + count - 1) - earlier_keys(length) for length, count in completions)
        pages = {node: num_pages(node.start, node.end) for node in kept}
        shared = sum(count for node, count in pages.items() if users[node] > 1)
        own = sum(pages.values()) - shared + sum(continuation_pages(length, count) for length, count in completions)
        return cls(
            prompt_tokens=sum(len(node.tokens) for node in users),
            kept_tokens=sum(len(node.tokens) for node in kept),
            sequences=len(completions),
            steps=steps,
            longest=max((count - 1 for _, count in completions), default=0),
            shortest=min((count - 1 for _, count in completions), default=0),
            step_shares=tuple(_step_shares([count - 1 for _, count in completions])),
            context=read / steps if steps else 0.0,
            earlier=earlier / steps if steps else 0.0,
            sequence_tokens=PAGE_TOKENS * own / len(completions) if completions else 0.0,
            shared_tokens=PAGE_TOKENS * shared,
            earlier_keys=sum(earlier_keys(node.end) - earlier_keys(node.start) for node in users),
            new_tokens=sum(sum(prompt.new_tokens) for prompt in prompts),
            scored_positions=sum(len(node.tokens) for node in scored),
        )

    @property
    def mean_age(self) -> float:
        """Steps that a completion has taken before a step, on average over `step_shares`."""
        steps = sum(share * steps for share, steps in self.step_shares)
        return sum(share * steps * (steps - 1) / 2 for share, steps in self.step_shares) / steps if steps else 0.0

    @property
    def prompt_share(self) -> float:
        """Share of the computed prompt tokens whose K and V are kept."""
        return self.kept_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def _step_shares(steps: Sequence[int]) -> Iterator[tuple[float, int]]:
    """Yield shares of completions and their steps: of equal parts in order the mean, and of all the most."""
    ordered = sorted(steps)
    if len(set(ordered)) <= STEP_PARTS:
        yield from ((number / len(ordered), count) for count, number in sorted(Counter(ordered).items()))
        return
    *others, longest = ordered
    for i in range(STEP_PARTS):
        part = others[len(others) * i // STEP_PARTS : len(others) * (i + 1) // STEP_PARTS]
        yield len(part) / len(ordered), max(1, round(sum(part) / len(part)))
    yield 1 / len(ordered), longest
