"""Segments of packed rows: the next tokens of a node or of a completion, and which logits they request."""

from __future__ import annotations

from flexgen_helm.schedule.rows import Continuation, LogitRequest, Segment
from flexgen_helm.schedule.tree import Node
from flexgen_helm.schedule.work import PromptWork, decode_position


def prompt_segment(node: Node, offset: int, count: int, work: PromptWork | None) -> Segment:
    """Return tokens ``[offset, offset + count)`` of a node that has its pages.

    Args:
        node: The node.
        offset: Tokens of it that were computed before.
        count: Tokens of it that are computed now.
        work: That ends at the node; None: there is none.
    """
    assert node.pages is not None
    return Segment(
        node.tokens[offset : offset + count],
        node.start + offset,
        node.pages.table,
        node.pages.written_copy if offset == 0 else None,
        node.pages.exact_table,
        _prompt_requests(node, offset, count, work),
        owner=node,
    )


def decode_segment(work: PromptWork, continuation: Continuation) -> Segment:
    """Return the last token of a completion, which requests the next one."""
    pages = continuation.pages
    assert pages is not None
    copy = pages.written_copy if len(continuation.tokens) == 1 else None
    request = LogitRequest(0, (), (continuation,))
    start = decode_position(work, continuation)
    return Segment((continuation.tokens[-1],), start, pages.table, copy, pages.exact_table, [request], owner=continuation)


def _prompt_requests(node: Node, offset: int, count: int, work: PromptWork | None) -> list[LogitRequest]:
    requests: list[LogitRequest] = []
    scores = node.scores
    if scores is not None:
        inner = range(offset, min(offset + count, len(node.tokens) - 1))
        requests = [LogitRequest(i - offset, ((scores, i + 1),), ()) for i in inner if scores.logprobs[i + 1] is None]
    if offset + count == len(node.tokens):
        # First tokens are chosen whenever the prompt's last token is computed, be it for other work before admission.
        below = [child.scores for child in node.children]
        last = tuple((first, 0) for first in below if first is not None and first.logprobs[0] is None)
        continuations = () if work is None else tuple(c for c in work.continuations if not c.tokens)
        if last or continuations:
            requests.append(LogitRequest(count - 1, last, continuations))
    return requests
