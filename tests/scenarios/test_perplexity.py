"""Perplexity of documents through HELM against windows by hand on a plain forward."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from helm.benchmark.model_deployment_registry import get_model_deployment, register_model_deployment
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flexgen_helm.assets import install_helm_data
from flexgen_helm.errors import CorruptFile, FlexGenError, ScenarioError
from flexgen_helm.scenarios.perplexity import PerplexityScenario, cut
from tests.dimensions import MAX_LENGTH, VOCAB_SIZE
from tests.reference import PROMPT_TOLERANCE, Reference
from tests.scenarios.suites import Run, run_entry
from tests.tokenizers import PAIRS


@dataclasses.dataclass(frozen=True)
class Judge:
    """Scores documents with a plain forward of each window."""

    folder: Path
    context: int
    """Tokens of a window, special ones included."""
    prefix: tuple[int, ...]
    """Special tokens before a document."""
    added: tuple[int, ...]
    """Special tokens that the tokenizer puts before any text."""

    def scores(self, document: str) -> list[float]:
        """Returns the log-probability of each token of a document.

        The first window is as long as fits behind the prefix. Each further one predicts as many tokens as fit behind a single
        one, and what room is left in the last one is filled with tokens that are known already.
        """
        reference = Reference(self.folder)
        ids = AutoTokenizer.from_pretrained(self.folder)(document, add_special_tokens=False)["input_ids"]
        length = self.context - len(self.added)
        done = min(length - len(self.prefix), len(ids))
        scores = reference.score([*self.prefix, *ids[:done]])[len(self.prefix) :]
        while done < len(ids):
            end = min(done + length - 1, len(ids))
            scores += reference.score([*self.added, *ids[end - length : end]])[done - end :]
            done = end
        return scores


def assert_equal_scores(run: Run, documents: list[str], judge: Judge) -> None:
    """Compares each token, and the statistics of all documents together with their definitions."""
    expected = [score for document in documents for score in judge.scores(document)]
    tokens = [
        token
        for state in run.read("scenario_state.json")["request_states"]
        for token in state["result"]["completions"][0]["tokens"][state["num_conditioning_tokens"] :]
    ]
    for token, score in zip(tokens, expected, strict=True):
        assert token["logprob"] == pytest.approx(score, abs=PROMPT_TOLERANCE), token
    num_bytes = len("".join(documents).encode())
    assert sum(run.values("num_perplexity_tokens")) == len(expected)
    assert sum(run.values("num_bytes")) == num_bytes
    nats = -sum(expected)
    assert run.stat("perplexity") == pytest.approx(math.exp(nats / len(expected)), rel=PROMPT_TOLERANCE)
    assert run.stat("bits_per_byte") == pytest.approx(nats / math.log(2) / num_bytes, rel=PROMPT_TOLERANCE)
    assert run.stat("num_instances") == len(documents)


def write(folder: Path, documents: list[str]) -> None:
    folder.mkdir()
    for number, document in enumerate(documents):
        (folder / f"{number}.txt").write_text(document)


def test_windows_behind_a_bos_token(bos_model: Path, tmp_path: Path) -> None:
    random = Random(1)
    documents = ["".join(random.choices(PAIRS, k=length)) for length in (1500, MAX_LENGTH - 2, MAX_LENGTH - 1, 1)]
    write(tmp_path / "texts", documents)
    run = run_entry(f"perplexity:path={tmp_path}/texts", f"flexgen/{bos_model}", tmp_path)
    assert_equal_scores(run, documents, Judge(bos_model, MAX_LENGTH, prefix=(1,), added=(1,)))
    windows = [state["instance"]["id"] for state in run.read("scenario_state.json")["request_states"]]
    assert windows == ["id0"] * 3 + ["id1"] + ["id2"] * 2 + ["id3"]


def test_windows_of_a_model_without_bos(writing_model: Path, tmp_path: Path) -> None:
    random = Random(2)
    alphabet = [chr(code) for code in range(32, 127)] + ["\n", "\N{EN DASH}", "\N{RIGHT SINGLE QUOTATION MARK}"]
    documents = ["".join(random.choices(alphabet, k=length)) for length in (1500, 30)]
    write(tmp_path / "texts", documents)
    run = run_entry(f"perplexity:path={tmp_path}/texts", f"flexgen/{writing_model}", tmp_path)
    # The end token stands before a document, as in GPT-2.
    assert_equal_scores(run, documents, Judge(writing_model, MAX_LENGTH, prefix=(VOCAB_SIZE - 1,), added=()))


def test_blank_documents_are_left_out_and_nothing_else_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "texts", ["one\n", " \n", "", " two"])
    instances = PerplexityScenario(str(tmp_path / "texts")).get_instances("")
    assert [(instance.input.text, instance.split) for instance in instances] == [("one\n", "test"), (" two", "test")]
    write(tmp_path / "blank", [" \n", ""])
    with pytest.raises(ScenarioError, match="holds no text, so there is nothing to predict"):
        PerplexityScenario(str(tmp_path / "blank")).get_instances("")


@pytest.mark.slow
def test_smollm2_on_the_beginning_of_the_address(real_model: Path, tmp_path: Path) -> None:
    try:
        install_helm_data(tmp_path)
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))
    address = (tmp_path / "scenarios" / "perplexity" / "sotu_2026.txt").read_text()
    documents = [address[:3000], "Caf\u00e9 \u65e5\u672c \U0001f389 end."]
    write(tmp_path / "texts", documents)
    deployment = get_model_deployment(f"flexgen/{real_model}")
    short = dataclasses.replace(deployment, name="flexgen/short/SmolLM2", model_name="short/SmolLM2", max_sequence_length=128)
    register_model_deployment(short)
    run = run_entry(f"perplexity:path={tmp_path}/texts", short.name, tmp_path)
    assert len(run.read("scenario_state.json")["request_states"]) > 5
    # <|im_start|>, which this tokenizer does not add by itself.
    assert_equal_scores(run, documents, Judge(real_model, 128, prefix=(1,), added=()))


@given(st.text(alphabet="ab \n\u00e9\u3000\ud800", max_size=60), st.integers(1, 12))
def test_pieces_are_the_document_and_fit(document: str, most: int) -> None:
    pieces = list(cut(document, most))
    assert "".join(pieces) == document.rstrip()
    for piece in pieces:
        assert len(piece.encode(errors="replace")) <= most or len(piece.split()) == 1
    # No two neighbours would fit together.
    for first, second in pairwise(pieces):
        word = second[: len(second) - len(second.lstrip())] + second.split()[0]
        assert len((first + word).encode(errors="replace")) > most


def test_pieces_are_instances(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three\n")
    instances = PerplexityScenario("text.txt", piece_bytes=7).get_instances(str(tmp_path))
    assert [instance.input.text for instance in instances] == ["one two", " three"]
