"""LAMBADA through HELM against plain ``transformers``: the word that ``generate`` writes, the sum of a forward's rows."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from flexgen_helm.assets import install_helm_data
from flexgen_helm.errors import CorruptFile, FlexGenError, ScenarioError
from flexgen_helm.scenarios import lambada
from flexgen_helm.scenarios.lambada import LambadaScenario
from flexgen_helm.scenarios.last_word import begins_with_word
from flexgen_helm.scenarios.texts import Source
from tests.reference import PROMPT_TOLERANCE, Reference
from tests.scenarios.suites import run_entry


class Judge:
    """Answers about a passage and its last word, from plain ``transformers``."""

    def __init__(self, folder: Path) -> None:
        """Loads a model folder."""
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._reference = Reference(folder)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def continuation(self, passage: str) -> str:
        """Returns what ``generate`` writes in 8 greedy steps."""
        text = self._tokenizer.decode(self._reference.greedy(self._ids(passage), 8).token_ids, skip_special_tokens=True)
        return str(text)

    def scores(self, passage: str, word: str) -> tuple[list[float], bool]:
        """Returns the log-probability of each token of the word, and whether each is the most probable one."""
        context, ids = self._ids(passage), self._ids(f"{passage} {word}")
        rows = self._reference.log_probs(ids)[len(context) - 1 : -1]
        targets = ids[len(context) :]
        return [float(row[token]) for row, token in zip(rows, targets, strict=True)], rows.argmax(-1).tolist() == targets


def write(path: Path, texts: list[str]) -> list[tuple[str, str]]:
    """Writes passages and returns each with its last word."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [(text[: text.rindex(" ")], text[text.rindex(" ") + 1 :]) for text in texts]


@pytest.mark.parametrize(
    ("answer", "word", "right"),
    [
        (" signs. He", "signs", True),
        ("signs", "signs", True),
        (" signs", "sign", False),
        (" sign-post", "sign", True),
        (" sign\u00e9", "sign", False),
        (" the signs", "signs", False),
        (" Signs", "signs", False),
        (' "Nadia," he', '"Nadia', True),
        (" Nadia", '"Nadia', False),
        (" axb", "a.b", False),
        ("", "signs", False),
    ],
)
def test_the_first_word_counts_and_must_end(answer: str, word: str, right: bool) -> None:
    assert begins_with_word(answer, word) is right


def test_generated_words_equal_plain_generate(writing_model: Path, tmp_path: Path) -> None:
    judge = Judge(writing_model)
    passages = [f"{'abcdefgh'[number:]} and {number}" for number in range(8)]
    continuations = [judge.continuation(passage) for passage in passages]
    words = [re.findall(r"\S+", text)[0] for text in continuations]
    # Half of the words are what the model writes, whole if it is of letters; the others are something else.
    texts = [
        f"{passage} {word if number % 2 else word[:-1] + '?'}"
        for number, (passage, word) in enumerate(zip(passages, words, strict=True))
    ]
    instances = write(tmp_path / "passages.jsonl", texts)
    run = run_entry(f"lambada:path={tmp_path}/passages.jsonl", f"flexgen/{writing_model}", tmp_path)
    states = run.read("scenario_state.json")["request_states"]
    assert [state["request"]["prompt"] for state in states] == [passage for passage, _ in instances]
    assert [state["result"]["completions"][0]["text"] for state in states] == [text.split("\n")[0] for text in continuations]
    assert run.values("last_word_accuracy") == [0, 1] * 4
    assert run.stat("last_word_accuracy") == 0.5


def test_word_logprobs_equal_a_plain_forward(writing_model: Path, bos_model: Path, tmp_path: Path) -> None:
    texts = ["One, two: three", "The last word of this is long", 'He said "yes', "a b"]
    instances = write(tmp_path / "passages.jsonl", texts)
    judge = Judge(writing_model)
    expected = [sum(judge.scores(*instance)[0]) for instance in instances]
    run = run_entry(f"lambada:task=perplexity,path={tmp_path}/passages.jsonl", f"flexgen/{writing_model}", tmp_path)
    # A token is a character here, so a word of n letters is n + 1 tokens.
    for logprob, reference, (_, word) in zip(run.values("last_word_logprob"), expected, instances, strict=True):
        assert logprob == pytest.approx(reference, abs=PROMPT_TOLERANCE * (len(word) + 1))
    assert run.stat("last_word_perplexity") == pytest.approx(math.exp(-sum(expected) / 4), rel=PROMPT_TOLERANCE * 6)
    # Requests take their time, and their numbers are in the table of the quickstart.
    assert run.stat("num_prompt_tokens") == sum(map(len, texts)) / 4
    assert run.values("inference_runtime")


def test_passage_that_is_cut_is_refused(writing_model: Path, tmp_path: Path) -> None:
    write(tmp_path / "passages.jsonl", ["a " * 400 + "end"])
    with pytest.raises(ScenarioError, match="longer than the context of flexgen/"):
        run_entry(f"lambada:task=perplexity,path={tmp_path}/passages.jsonl", f"flexgen/{writing_model}", tmp_path)


def test_converted_file_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Source] = []

    def note(source: Source, folder: Path) -> list[str]:
        asked.append(source)
        return ["a b"]

    monkeypatch.setattr(lambada, "read_texts", note)
    LambadaScenario().get_instances(str(tmp_path))
    (tmp_path / lambada.CONVERTED_FILE).touch()
    LambadaScenario().get_instances(str(tmp_path))
    LambadaScenario(config="de").get_instances(str(tmp_path))
    hub = "EleutherAI/lambada_openai"
    assert [(source.path, source.config) for source in asked] == [
        (hub, None),
        (str(tmp_path / "lambada_openai_test.jsonl"), None),
        (hub, "de"),
    ]


def test_passage_of_one_word_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["two words"])
    (tmp_path / "b.jsonl").write_text('{"text": "two words"}\n{"text": " word\\n"}')
    assert len(LambadaScenario(path=str(tmp_path / "a.jsonl")).get_instances("")) == 1
    with pytest.raises(ScenarioError, match=r"Passage 1 of LAMBADA is ' word\\n'"):
        LambadaScenario(path=str(tmp_path / "b.jsonl")).get_instances("")


def test_blank_passages_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [" ", "two words", "  "])
    (instance,) = LambadaScenario(path=str(tmp_path / "a.jsonl")).get_instances("")
    assert instance.input.text == "two"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_on_the_first_200_passages(real_model: Path, tmp_path: Path) -> None:
    """Accuracy 0.340 and perplexity 42.1 are what plain ``transformers`` gave with the usual definitions."""
    try:
        install_helm_data(tmp_path)
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))
    instances = LambadaScenario().get_instances(str(tmp_path / "scenarios" / "lambada"))[:200]
    pairs = [(instance.input.text, instance.references[0].output.text) for instance in instances]
    write(tmp_path / "passages.jsonl", [" ".join(pair) for pair in pairs])
    judge = Judge(real_model)
    scores = [judge.scores(*pair) for pair in pairs]
    deployment, path = f"flexgen/{real_model}", f"path={tmp_path}/passages.jsonl"

    scored = run_entry(f"lambada:task=perplexity,{path}", deployment, tmp_path)
    for logprob, (tokens, _) in zip(scored.values("last_word_logprob"), scores, strict=True):
        assert logprob == pytest.approx(sum(tokens), abs=PROMPT_TOLERANCE * len(tokens))
    assert scored.stat("last_word_perplexity") == pytest.approx(42.1, abs=0.05)

    usual = [right for _, right in scores]
    assert sum(usual) / 200 == 0.340
    ours = [bool(right) for right in run_entry(f"lambada:{path}", deployment, tmp_path).values("last_word_accuracy")]
    # The definitions could part where the model goes on with a word; after these passages it does not.
    assert ours == usual
