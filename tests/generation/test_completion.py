"""Where a completion ends, against a plain search of the whole text and HELM's own truncation."""

from __future__ import annotations

import pytest
from helm.clients.client import truncate_sequence
from helm.common.request import GeneratedOutput, Request, Token
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexgen_helm.generation.completion import CompletionBuilder
from flexgen_helm.generation.detokenizer import token_texts
from flexgen_helm.generation.stop_strings import StopFinder, find_stop
from flexgen_helm.generation.vocabulary import Vocabulary
from flexgen_helm.types import Completion, Job, TokenLogprob
from tests import tiny_tokenizers

EXAMPLES = settings(derandomize=True, max_examples=150, deadline=None)

VOCABULARIES = {
    "byte_level": Vocabulary(tiny_tokenizers.byte_level()),
    "metaspace_bpe": Vocabulary(tiny_tokenizers.metaspace_bpe()),
}
END = 2
"""Id of ``</s>``."""
KINDS = pytest.mark.parametrize("kind", sorted(VOCABULARIES))

texts = st.text("ab\n .日😀", max_size=30)
stop_lists = st.lists(st.text("ab\n .日😀", min_size=1, max_size=5), min_size=1, max_size=3)


def encode(kind: str, text: str) -> list[int]:
    return list(VOCABULARIES[kind].tokenizer.encode(text, add_special_tokens=False))


def complete(kind: str, token_ids: list[int], *, stop: tuple[str, ...] = (), limit: int = 1000) -> Completion:
    """Feeds tokens until the builder has enough; token i has log-probability -i."""
    job = Job(prompt="x", max_new_tokens=limit, stop=stop)
    builder = CompletionBuilder(VOCABULARIES[kind], encode(kind, "Q: x"), job=job, end_token_ids={END})
    for index, token_id in enumerate(token_ids):
        reason = builder.append(token_id, -float(index), [TokenLogprob(token_id, -float(index))])
        assert reason == builder.finish_reason
        if reason is not None:
            break
    return builder.finish()


@EXAMPLES
@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
def test_finder_finds_what_a_search_of_each_prefix_finds(parts: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    text = ""
    for part in parts:
        text += part
        expected = min((text.index(stop) for stop in stops if stop in text), default=None)
        assert find_stop(text, stops) == expected
        assert finder.append(part) == expected
        if expected is not None:
            break


@KINDS
@EXAMPLES
@given(text=texts, stops=stop_lists)
def test_completion_ends_where_the_stop_begins(kind: str, text: str, stops: list[str]) -> None:
    token_ids = encode(kind, text)
    free = complete(kind, token_ids)
    completion = complete(kind, token_ids, stop=tuple(stops))
    kept = len(completion.token_ids)
    assert completion.token_ids == token_ids[:kept]
    assert completion.logprobs == [-float(index) for index in range(kept)]
    assert [row[0].token_id for row in completion.top_logprobs] == completion.token_ids
    assert len(completion.token_texts) == kept
    cut = find_stop(free.text, stops)
    if cut is None:
        assert completion == free
        return
    assert completion.finish_reason == "stop"
    assert free.text.startswith(completion.text)
    assert any(free.text.startswith(stop, len(completion.text)) for stop in stops)
    if len(stops) == 1:  # Several may be found one after the other: what ends a text first depends on its tokens.
        assert completion.text == free.text[:cut]
    # The stop begins in the last token that is kept.
    before, after = pieces(kind, completion.token_ids[:-1]), pieces(kind, completion.token_ids)
    assert len(before) <= len(completion.text.encode()) < len(after)


def pieces(kind: str, token_ids: list[int]) -> bytes:
    """The bytes of tokens behind the prompt."""
    return b"".join(VOCABULARIES[kind].piece(token_id) for token_id in token_ids)


@KINDS
@EXAMPLES
@given(text=texts, stop=st.text("ab\n .日😀", min_size=1, max_size=5))
def test_helm_truncates_the_same_text(kind: str, text: str, stop: str) -> None:
    """HELM cuts an endless answer where ours ends, and leaves ours as it is."""
    token_ids = encode(kind, text)
    request = Request(model="a/b", model_deployment="a/b", max_tokens=1000, stop_sequences=[stop])

    def truncated(completion: Completion) -> GeneratedOutput:
        tokens = [
            Token(text=token, logprob=logprob)
            for token, logprob in zip(completion.token_texts, completion.logprobs, strict=True)
        ]
        output = GeneratedOutput(text=completion.text, logprob=sum(completion.logprobs), tokens=tokens)
        return truncate_sequence(output, request, print_warning=False)

    completion = complete(kind, token_ids, stop=(stop,))
    assert truncated(complete(kind, token_ids)).text == completion.text
    assert truncated(completion).text == completion.text


@pytest.mark.parametrize(
    ("tokens", "stop", "text", "num_text_tokens"),
    [
        (["a", "\n"], "\n", "a", 1),
        (["a", "\n"], "a\n", "", 0),
        # The stop begins inside of a token, which HELM keeps.
        (["a", ".a", "b"], "ab", "a.", 2),
        (["a", "a", "a", "b"], "aab", "a", 1),
        # A character is all of its tokens.
        (["aぬ", "b"], "b", "aぬ", 4),
    ],
)
def test_tokens_that_have_a_part_in_the_text(tokens: list[str], stop: str, text: str, num_text_tokens: int) -> None:
    token_ids = [token_id for token in tokens for token_id in encode("byte_level", token)]
    completion = complete("byte_level", token_ids, stop=(stop,))
    assert (completion.text, completion.num_text_tokens) == (text, num_text_tokens)


@EXAMPLES
@given(text=st.text("ab\n .", max_size=30), stops=st.lists(st.text("ab\n .", min_size=1, max_size=5), max_size=3))
def test_as_many_tokens_have_a_part_as_are_needed_to_write_the_text(text: str, stops: list[str]) -> None:
    token_ids = encode("byte_level", text)
    completion = complete("byte_level", token_ids, stop=tuple(stops))
    lengths = [len(pieces("byte_level", token_ids[:count])) for count in range(len(token_ids) + 1)]
    assert completion.num_text_tokens == next(i for i, length in enumerate(lengths) if length >= len(completion.text))


BROKEN = st.sampled_from([b"\xe7", b"\x96", b"\xcf", b"\xf0", b"\x9f", b"\x98", b"\xc3", b"\xa9", b"b"])


@KINDS
@settings(EXAMPLES, max_examples=400)
@given(parts=st.lists(BROKEN, max_size=12))
@example(parts=[b"\xe7", b"\x96", b"\xcf"])
def test_a_stop_behind_broken_characters_begins_in_its_own_token(kind: str, parts: list[bytes]) -> None:
    ids = {VOCABULARIES[kind].piece(token_id): token_id for token_id in range(len(VOCABULARIES[kind].tokenizer))}
    completion = complete(kind, [*(ids[part] for part in parts), ids[b"a"], ids[b"b"]], stop=("a",))
    assert completion.num_text_tokens == len(parts)
    assert completion.token_ids[-1] == ids[b"a"]


def test_a_stop_across_tokens_drops_the_later_ones() -> None:
    token_ids = [*encode("byte_level", "dog"), *encode("byte_level", "#"), *encode("byte_level", "#"), 5]
    completion = complete("byte_level", token_ids, stop=("##",))
    assert completion.text == "dog"
    assert completion.token_ids == token_ids[:-2]
    assert completion.finish_reason == "stop"


@KINDS
def test_a_stop_that_needs_more_bytes_is_found_when_they_come(kind: str) -> None:
    token_ids = encode(kind, "aぬb")
    assert len(token_ids) >= 5  # The character is several tokens.
    completion = complete(kind, token_ids, stop=("ぬ",))
    assert completion.text.strip() == "a"
    assert completion.finish_reason == "stop"
    # It begins in the token of its first byte, which is kept.
    assert pieces(kind, completion.token_ids[-1:]) == "ぬ".encode()[:1]


@KINDS
def test_an_end_token_is_kept_but_not_its_text(kind: str) -> None:
    token_ids = encode(kind, "The dog")
    completion = complete(kind, [*token_ids, END, *token_ids])
    assert completion.finish_reason == "endoftext"
    assert completion.token_ids == [*token_ids, END]
    assert completion.text.strip() == "The dog"
    assert completion.token_texts[-1] == "</s>"


@KINDS
def test_an_end_token_at_once_ends_an_empty_completion(kind: str) -> None:
    completion = complete(kind, [END, *encode(kind, "The dog")])
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [END], "endoftext")
    assert completion.num_text_tokens == 0


@KINDS
def test_the_limit_ends_a_completion(kind: str) -> None:
    token_ids = encode(kind, "The quick brown fox")
    completion = complete(kind, token_ids, limit=2)
    assert completion.finish_reason == "length"
    assert completion.token_ids == token_ids[:2]
    assert "".join(completion.token_texts) == completion.text


def test_a_stop_at_the_limit_is_a_stop_and_an_end_token_is_an_end() -> None:
    token_ids = encode("byte_level", "a\n")
    assert complete("byte_level", token_ids, stop=("\n",), limit=2).finish_reason == "stop"
    assert complete("byte_level", [token_ids[0], END], stop=("\n",), limit=2).finish_reason == "endoftext"


def test_a_broken_character_at_the_end_is_not_lost() -> None:
    token_ids = encode("byte_level", "aぬ")[:-1]
    completion = complete("byte_level", token_ids)
    assert completion.text == VOCABULARIES["byte_level"].tokenizer.decode(token_ids)
    assert completion.token_texts[0] == "a"
    assert all(text.startswith("bytes:") for text in completion.token_texts[1:])


def test_a_replacement_character_can_be_a_stop() -> None:
    token_ids = encode("byte_level", "a\ufffdb")
    completion = complete("byte_level", token_ids, stop=("\ufffd",))
    assert (completion.text, completion.finish_reason) == ("a", "stop")


def test_the_literal_text_of_a_special_token_can_be_a_stop() -> None:
    (special,) = encode("byte_level", "<|im_end|>")
    token_ids = encode("byte_level", "dog")
    completion = complete("byte_level", [*token_ids, special, *token_ids], stop=("<|im_end|>",))
    assert completion.finish_reason == "stop"
    assert completion.token_ids == [*token_ids, special]
    assert completion.text == "dog"
    assert complete("byte_level", [*token_ids, special, *token_ids]).text == "dogdog"


def test_without_a_tokenizer_there_are_tokens_but_no_texts() -> None:
    job = Job(token_ids=[1], max_new_tokens=3)
    builder = CompletionBuilder(None, [1], job=job, end_token_ids={9})
    assert [builder.append(token_id, -1.0) for token_id in (4, 5, 9)] == [None, None, "endoftext"]
    assert builder.finish() == Completion("", [4, 5, 9], ["", "", ""], [-1.0] * 3, [[], [], []], "endoftext", 2)
    with pytest.raises(ValueError, match="tokenizer"):
        CompletionBuilder(None, [1], job=Job(token_ids=[1], stop=("a",)), end_token_ids=())


def test_nothing_follows_an_end() -> None:
    builder = CompletionBuilder(None, [1], job=Job(token_ids=[1], max_new_tokens=1), end_token_ids=())
    assert builder.append(7, 0.0) == "length"
    with pytest.raises(RuntimeError, match="ended by length"):
        builder.append(7, 0.0)


def test_an_empty_completion() -> None:
    completion = complete("byte_level", [])
    assert completion == Completion("", [], [], [], [], "length", 0)
    assert token_texts(VOCABULARIES["byte_level"], []) == []
