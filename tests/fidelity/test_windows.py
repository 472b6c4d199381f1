"""Windows: every token counts once, and what cannot be read is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flexgen_helm.errors import InvalidJob
from flexgen_helm.fidelity.compare import blocks, groups_of
from flexgen_helm.fidelity.windows import Reader, Window
from tests.tokenizers import BOS, save_pair_tokenizer


@pytest.fixture(scope="module", params=[False, True])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """One token for each pair of letters, with and without a BOS token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_pair_tokenizer(folder, adds_bos=request.param)
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return found


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer("aa")["input_ids"][0] == BOS)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(8, 60), length=st.integers(2, 8))
def test_every_token_of_a_text_counts_once(tokenizer: PreTrainedTokenizerBase, count: int, length: int, tmp_path: Path) -> None:
    text = "".join(f"a{'abcd'[i % 4]}" for i in range(count))
    (tmp_path / "text").write_text(text)
    found = Reader(tokenizer, length).text(tmp_path / "text")
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    targets = tuple(token for window in found.windows for token in window.targets)
    assert targets == (ids if adds_bos(tokenizer) else ids[1:])
    assert found.num_positions == len(targets)
    assert found.num_bytes == 2 * len(targets)
    assert [window.group for window in found.windows] == list(range(len(found.windows)))
    for window in found.windows:
        assert 2 <= len(window.tokens) <= length
        assert window.first == 1
        assert (window.tokens[0] == BOS) == adds_bos(tokenizer)


def test_jobs_are_groups(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    lines = [{"prompt": "aaabacadaa"}, {"token_ids": [3, 4, 5]}]
    (tmp_path / "jobs").write_text("\n\n".join(map(json.dumps, lines)))
    found = Reader(tokenizer, 3).jobs(tmp_path / "jobs")
    assert found.groups == "jobs"
    assert {window.group for window in found.windows} == {0, 1}
    assert found.windows[-1] == Window((3, 4, 5), 1, 1)
    first = 5 if adds_bos(tokenizer) else 4
    assert groups_of(found.windows).tolist() == [0] * first + [1, 1]
    assert found.num_bytes == 2 * (first + 2)


def test_the_most_tokens_are_those_of_all_texts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("aa" * 50)
    (tmp_path / "jobs").write_text("\n".join([json.dumps({"token_ids": [3] * 6})] * 5))
    extra = int(adds_bos(tokenizer))
    found = Reader(tokenizer, 4, max_tokens=9).text(tmp_path / "text")
    assert (found.num_positions, found.num_bytes) == (8 + extra, 2 * (8 + extra))
    assert Reader(tokenizer, 4, max_tokens=9).jobs(tmp_path / "jobs").num_positions == 5 + 2


def test_the_digest_is_of_what_is_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("aaab" * 9)
    (tmp_path / "two").write_text("aaab" * 9)
    (tmp_path / "three").write_text("aaab" * 8 + "aaaa")
    one, two, three = (Reader(tokenizer, 4).text(tmp_path / name).digest for name in ("one", "two", "three"))
    assert one == two != three
    assert Reader(tokenizer, 5).text(tmp_path / "one").digest != one


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "cannot be read"),
        (b"aaab", "less than a window of 8"),
    ],
)
def test_texts_that_cannot_be_used(tokenizer: PreTrainedTokenizerBase, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(InvalidJob, match=reason):
        Reader(tokenizer, 8).text(tmp_path / "text")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ("[]", "one field prompt or token_ids"),
        ('{"prompt": "a", "stop": []}', "one field prompt or token_ids"),
        ('{"token_ids": "ab"}', "no list of integers"),
        ('{"token_ids": [5]}', "fewer than two tokens"),
        ('{"prompt": ""}', "no tokens in line 1"),
    ],
)
def test_jobs_that_cannot_be_used(tokenizer: PreTrainedTokenizerBase, line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text(line)
    with pytest.raises(InvalidJob, match=reason):
        Reader(tokenizer, 8).jobs(tmp_path / "jobs")


def test_a_text_needs_a_tokenizer_and_token_ids_do_not(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some text")
    (tmp_path / "jobs").write_text('{"token_ids": [5, 6]}')
    with pytest.raises(InvalidJob, match="no tokenizer"):
        Reader(None, 8).text(tmp_path / "text")
    assert Reader(None, 8).jobs(tmp_path / "jobs").num_bytes is None


@given(st.lists(st.integers(2, 9), min_size=1, max_size=20), st.integers(1, 30))
def test_blocks_hold_all_windows_in_order(lengths: list[int], most: int) -> None:
    windows = [Window((5,) * length, 1, group) for group, length in enumerate(lengths)]
    found = list(blocks(windows, most))
    assert [window for block in found for window in block] == windows
    assert all(len(block) == 1 or sum(len(window.tokens) for window in block) <= most for block in found)
