"""Prefix tree over whole tokenised prompts: tokens that prompts have in common are computed once.

A node holds a run of tokens; prompts end at the end of a node. Nothing here knows about rows, pages or tensors, apart from
the fields of `Node` that the scheduler keeps while a node is being computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flexgen_helm.kv_cache.pages import PAGE_TOKENS


@dataclass(eq=False)
class Node:
    """Tokens ``[start, end)`` of every prompt in its subtree."""

    parent: Node | None
    start: int
    tokens: tuple[int, ...]
    children: list[Node] = field(default_factory=list)
    scores: Scores | None = None
    """Log-probabilities of ``tokens``; None: no prompt in the subtree is scored."""
    users: int = 0
    """Unfinished work that still needs this node's K and V in later sweeps."""
    pages: NodePages | None = None
    """Pages of its K and V; None: it has none now."""
    num_seen: int = 0
    """Tokens that were computed at least once."""
    finite: bool = True
    """Whether K and V of all its tokens were finite numbers; prompts that hold this node have no answer if not."""

    @property
    def end(self) -> int:
        """Absolute position behind the last token."""
        return self.start + len(self.tokens)

    @property
    def first_own(self) -> int:
        """Absolute position at which its own pages will begin: behind its parent's last page, if the rest of that is free."""
        above = self.parent.pages if self.parent is not None else None
        return self.start + (-self.start % PAGE_TOKENS if above is None or above.tail_free else 0)

    def path(self) -> list[Node]:
        """Nodes from the root's child down to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


@dataclass(eq=False)
class Scores:
    """Log-probabilities of consecutive tokens, each given all that precedes it."""

    tokens: tuple[int, ...]
    logprobs: list[float | None] = field(init=False)
    """None: not yet known."""
    is_best: list[bool] = field(init=False)
    """Whether each token is the most likely one; known where the log-probability is."""

    def __post_init__(self) -> None:
        self.logprobs, self.is_best = [None] * len(self.tokens), [False] * len(self.tokens)


@dataclass(eq=False)
class ExactPages:
    """Exact pages of consecutive tokens, in a cache that seals pages: see `flexgen_helm.schedule.exact_tables`."""

    own: list[int]
    """Kept pages of these tokens alone that are reserved for the chunk in which they end."""
    table: list[int] = field(default_factory=list)
    """Pages of the whole sequence, from position 0 up to the last token that was given one."""
    copy: tuple[int, int, int] | None = None
    """See `SequencePages.copy`."""
    num_given: int = 0
    """Pages of ``own`` that are in the table."""
    borrowed: list[tuple[int, int]] = field(default_factory=list)
    """Pages of a chunk in whose middle a sweep ended, each behind the absolute position at which the chunk ends."""


@dataclass(eq=False)
class SequencePages:
    """Pages that hold the K and V of consecutive tokens, which go on behind a node."""

    own: list[int]
    """Pages that belong to these tokens alone, those of the prefix not among them."""
    table: list[int]
    """Pages of the whole sequence, from position 0 up to the last of these tokens."""
    copy: tuple[int, int, int] | None
    """(source page, own page, tokens): what must be copied before the first token attends, where another sequence goes on in
    the last page of the prefix."""
    in_tail: bool
    """Whether these tokens begin in the rest of the prefix's last page."""
    exact: ExactPages | None = field(default=None, kw_only=True)
    """Their pages in the exact form, if ``table`` has sealed ones."""

    @property
    def written_copy(self) -> tuple[int, int, int] | None:
        """``copy`` in the form in which tokens are written."""
        return self.copy if self.exact is None else self.exact.copy

    @property
    def exact_table(self) -> list[int] | None:
        """The exact pages, if ``table`` has sealed ones."""
        return None if self.exact is None else self.exact.table


@dataclass(eq=False, kw_only=True)
class NodePages(SequencePages):
    """Pages of a node's tokens."""

    kept: bool
    """Kept over sweeps and for every layer, or only inside the layer being computed."""
    tail_free: bool = True
    """Whether the rest of the node's last page is nobody's: its first child, or first completion, goes on there."""
    scheduled: int = 0
    """Tokens of the node computed so far, those of the sweep being planned included."""


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two prompts share, by bisection over slices."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low if a[low] != b[low] else high


def build_tree(prompts: Sequence[tuple[int, ...]]) -> list[Node]:
    """Build the tree of distinct, non-empty prompts; returns the node at which each of them ends, in their order."""
    ends: dict[int, Node] = {}
    stack: list[Node] = []
    previous: tuple[int, ...] = ()
    for index in sorted(range(len(prompts)), key=prompts.__getitem__):
        prompt = prompts[index]
        shared = common_prefix_length(previous, prompt)
        while stack and stack[-1].start >= shared:
            stack.pop()
        if stack and stack[-1].end > shared:
            stack[-1] = _split(stack[-1], shared)
        parent = stack[-1] if stack else None
        node = Node(parent, shared, prompt[shared:])
        if parent is not None:
            parent.children.append(node)
        stack.append(node)
        ends[index] = node
        previous = prompt
    return [ends[index] for index in range(len(prompts))]


def _split(node: Node, position: int) -> Node:
    """Cut a node in two at an absolute position; the given node becomes the lower part. Returns the upper part."""
    size = position - node.start
    upper = Node(node.parent, node.start, node.tokens[:size], [node])
    if node.parent is not None:
        node.parent.children[node.parent.children.index(node)] = upper
    node.parent, node.start, node.tokens = upper, position, node.tokens[size:]
    return upper
