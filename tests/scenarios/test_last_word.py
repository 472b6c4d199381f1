"""Which tokens are the last word's, against the offsets that the tokenizer itself reports."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.scenarios.scenario import Input, Instance, Output, Reference
from helm.benchmark.window_services.window_service import EncodeResult
from helm.common.request import GeneratedOutput, Request, RequestResult, Token
from helm.common.tokenization_request import TokenizationToken
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flexgen_helm.errors import ScenarioError
from flexgen_helm.scenarios import last_word
from flexgen_helm.scenarios.last_word import LastWordPerplexity
from tests import tiny_tokenizers
from tests.tokenizers import save_character_tokenizer, save_pair_tokenizer

KINDS = ("pairs", "characters", "byte_level", "metaspace_bpe", "metaspace_unigram", "wordpiece")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerBase]:
    folder: Path = tmp_path_factory.mktemp("tokenizers")
    save_pair_tokenizer(folder / "pairs")
    save_character_tokenizer(folder / "characters")
    saved = {kind: AutoTokenizer.from_pretrained(folder / kind) for kind in KINDS[:2]}
    return saved | {kind: getattr(tiny_tokenizers, kind)() for kind in KINDS[2:]}


class Window:
    """A window service that has nothing but its tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> EncodeResult:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return EncodeResult(text, [TokenizationToken(number) for number in ids])


def logprob(tokenizer: PreTrainedTokenizerBase, passage: str, word: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """Scores a word where token number i has the log-probability -(2 ** i), so that the sum tells which were taken."""
    prompt = f"{passage} {word}"
    num_tokens = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    completion = GeneratedOutput(prompt, 0.0, [Token("", -(2.0**number)) for number in range(num_tokens)])
    request = Request(model="a/b", model_deployment="flexgen/a/b", prompt=prompt)
    state = RequestState(
        instance=Instance(Input(text=passage), [Reference(Output(text=word), [])], id="id7"),
        reference_index=0,
        request_mode="original",
        train_trial_index=0,
        output_mapping=None,
        request=request,
        result=RequestResult(True, [], [completion], False, request_time=0.0),
        num_train_instances=0,
        prompt_truncated=False,
    )
    with monkeypatch.context() as patch:
        factory = SimpleNamespace(get_window_service=lambda *_: Window(tokenizer))
        patch.setattr(last_word, "WindowServiceFactory", factory)
        patch.setattr(last_word, "compute_request_state_metrics", lambda *_: [])
        service: Any = None
        adapter_spec = AdapterSpec(model_deployment=request.model_deployment)
        (stat,) = LastWordPerplexity().evaluate_references(adapter_spec, [state], service, "")
    return float(stat.sum)


def begins(tokenizer: PreTrainedTokenizerBase, passage: str, word: str) -> int | None:
    """Returns the first token of which the text is behind the passage, if none has text of both; by offsets."""
    encoded = tokenizer(f"{passage} {word}", add_special_tokens=False, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    if any(start < len(passage) < end for start, end in spans):
        return None
    return next((number for number, (start, _) in enumerate(spans) if start >= len(passage)), None)


LETTERS = st.text(alphabet=" abcABC.,'\"?\n\t-éß中😀\u0301\u200d1", max_size=12)
PASSAGES = LETTERS.filter(lambda text: bool(text.strip()))
WORDS = LETTERS.map(lambda text: "".join(text.split())).filter(bool)


@pytest.mark.parametrize("kind", KINDS)
def test_the_word_is_the_tokens_behind_the_passage_or_it_is_refused(
    kind: str, tokenizers: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, scored = tokenizers[kind], list[float]()

    @settings(derandomize=True, max_examples=60, deadline=None, phases=(Phase.generate,))
    @given(PASSAGES, WORDS)
    def check(passage: str, word: str) -> None:
        ids = tokenizer(f"{passage} {word}", add_special_tokens=False)["input_ids"]
        before = tokenizer(passage, add_special_tokens=False)["input_ids"]
        first = begins(tokenizer, passage, word)
        # An unknown character is the same token whatever it is joined with, so that ids do not show what offsets do.
        unknown = {tokenizer.unk_token_id, tokenizer.pad_token_id} & set(ids)
        if first is None and not unknown:
            with pytest.raises(ScenarioError, match="instance id7"):
                logprob(tokenizer, passage, word, monkeypatch)
        elif ids[: len(before)] == before and len(ids) > len(before):
            scored.append(logprob(tokenizer, passage, word, monkeypatch))
            assert scored[-1] == -sum(2.0**number for number in range(len(before), len(ids)))
            assert unknown or first == len(before)

    check()
    assert scored


@pytest.mark.parametrize(("passage", "word"), [("ba", "b"), ("ba", "ab"), ("b", "b"), ("a b", "b")])
def test_a_token_of_both_is_refused_by_name(passage: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by difference of lengths, the word would have a token less than it has, or the passage's last one."""
    names = ["a", "b", " ", "a ", " b", "b b"]
    model = models.BPE({name: number for number, name in enumerate(names)}, [("a", " "), (" ", "b"), ("b", " b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    assert begins(tokenizer, passage, word) is None
    message = rf"instance id7 \({word!r}\).*flexgen/a/b joins it.*{passage!r}.*Correct or remove"
    with pytest.raises(ScenarioError, match=message):
        logprob(tokenizer, passage, word, monkeypatch)


def test_a_boundary_that_another_token_keeps_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.BPE({"a": 0, "b": 1, " ": 2, " b": 3, "aa": 4}, [(" ", "b"), ("a", "a")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    assert tokenizer("aaa baa").input_ids == [4, 0, 3, 4]
    assert logprob(tokenizer, "aaa", "baa", monkeypatch) == -(2.0**2 + 2.0**3)
