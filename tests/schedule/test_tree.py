"""The prefix tree against a plain trie of dictionaries."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.schedule.tree import build_tree, common_prefix_length

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=12, unique=True)


def trie_size(prompts: list[tuple[int, ...]]) -> int:
    return len({prompt[: i + 1] for prompt in prompts for i in range(len(prompt))})


@settings(derandomize=True, max_examples=200)
@given(PROMPTS)
def test_tree_holds_each_distinct_prefix_once(prompts: list[tuple[int, ...]]) -> None:
    ends = build_tree(prompts)
    nodes = {node for end in ends for node in end.path()}
    assert sum(len(node.tokens) for node in nodes) == trie_size(prompts)
    for prompt, end in zip(prompts, ends, strict=True):
        assert tuple(token for node in end.path() for token in node.tokens) == prompt
        assert end.end == len(prompt)
    for node in nodes:
        assert node.tokens
        assert all(child.parent is node and child.start == node.end for child in node.children)
        assert len({child.tokens[0] for child in node.children}) == len(node.children)


@settings(derandomize=True, max_examples=200)
@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_common_prefix_length_equals_a_loop(a: list[int], b: list[int]) -> None:
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix_length(a, b) == expected
