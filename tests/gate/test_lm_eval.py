"""Files of lm-eval's `--log_samples` in the forms of its versions, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.gate.checking import Check, check
from flexgen_helm.gate.config import GateConfig, LmEvalChoice, parse_config
from flexgen_helm.gate.lm_eval import NO_COUNT, read_samples
from flexgen_helm.reports.join import NotComparable

ANY = LmEvalChoice()
DATE = "2026-11-29T10-11-12.123456"


@pytest.fixture(autouse=True)
def _no_kept_fidelity(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path_factory.mktemp("cache")))


def choice(number: int, logprobs: list[float], target: int = 0, **more: Any) -> dict[str, Any]:
    """Returns a sample of scored choices as the first versions wrote it."""
    best = max(range(len(logprobs)), key=lambda at: logprobs[at])
    return {
        "doc_id": number,
        "doc": {"query": f"q{number}"},
        "target": target,
        "arguments": [[f"q{number}", f" c{at}"] for at in range(len(logprobs))],
        "resps": [[[value, False]] for value in logprobs],
        "filtered_resps": [[value, False] for value in logprobs],
        "acc": float(best == target),
        "acc_norm": 0.0,
        **more,
    }


def as_text(content: Any) -> Any:
    """Returns lists of which everything in them is text, as lm-eval's `sanitize_list` makes them."""
    return [as_text(each) for each in content] if isinstance(content, list) else str(content)


def latest(sample: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Returns the same sample as the latest versions write it."""
    metrics = [name for name in sample if name in ("acc", "acc_norm", "exact_match")]
    arguments = {
        f"gen_args_{number}": {f"arg_{at}": value for at, value in enumerate(asked)}
        for number, asked in enumerate(sample["arguments"])
    }
    texts = {name: as_text(sample[name]) for name in ("resps", "filtered_resps")}
    return {
        **sample,
        **texts,
        "arguments": arguments,
        "target": str(sample["target"]),
        "filter": "none",
        "metrics": metrics,
        **more,
    }


def text(number: int, answer: str, *, filtered: str | None = None, score: float = 1.0) -> dict[str, Any]:
    return {
        "doc_id": number,
        "doc": {},
        "target": "4",
        "arguments": [[f"q{number}", {"until": ["\n"], "do_sample": False}]],
        "resps": [[answer]],
        "filtered_resps": [answer if filtered is None else filtered],
        "exact_match": score,
    }


def lines(file: Path, samples: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return file


SAMPLES = [choice(0, [-1.0, -2.5]), choice(1, [-3.25, -2.0]), choice(2, [-1.5, -2.0], target=1)]


def test_both_forms_give_the_same_rows(tmp_path: Path) -> None:
    old = tmp_path / "pretrained__model_piqa.jsonl"
    old.write_text(json.dumps(SAMPLES, indent=2))
    new = lines(tmp_path / "model" / f"samples_piqa_{DATE}.jsonl", [latest(sample) for sample in SAMPLES])
    before, after = read_samples(old, ANY), read_samples(new, ANY)
    assert (list(before.runs), list(after.runs)) == (["task"], ["piqa"])
    for name in ("instance", "score", "logprob", "length", "answer", "answer_logprob", "prompt", "counts"):
        assert before.rows[name].tolist() == after.rows[name].tolist(), name
    assert after.rows["score"].tolist() == [1.0, 0.0, 0.0]
    assert after.rows["logprob"].tolist() == [-1.0, -3.25, -2.0]
    assert after.rows["answer"].tolist() == [" c0", " c1", " c0"]
    assert after.requests["logprob"].tolist() == [-1.0, -2.5, -3.25, -2.0, -1.5, -2.0]
    assert after.requests["reference"].tolist() == [0, 1, 0, 1, 0, 1]
    assert after.rows["tokens"].isna().all()
    assert after.runs["piqa"].reasons["tokens"] == NO_COUNT


def test_generated_texts_and_whole_documents(tmp_path: Path) -> None:
    samples = [text(0, "the answer is 4", filtered="4"), text(1, "?", filtered="[invalid]", score=0.0), text(2, "", score=0.0)]
    found = read_samples(lines(tmp_path / f"samples_gsm8k_{DATE}.jsonl", [latest(sample) for sample in samples]), ANY)
    assert found.requests["text"].tolist() == ["the answer is 4", "?", ""]
    assert found.rows["answer"].tolist() == ["4", "[invalid]", ""]
    assert found.rows["parsable"].tolist() == [1.0, 0.0, 0.0]
    assert found.rows["logprob"].isna().all()
    document = {
        "doc_id": 0,
        "doc": {},
        "target": "x",
        "arguments": [["a text"]],
        "resps": [[-123.5]],
        "filtered_resps": [-123.5],
    }
    for number, sample in enumerate((document, latest(document))):
        whole = read_samples(lines(tmp_path / str(number) / "samples_wikitext.jsonl", [sample]), ANY)
        assert whole.rows["logprob"].tolist() == [-123.5]
        assert math.isnan(whole.rows["score"][0])


def test_one_filter_and_one_metric_are_read(tmp_path: Path) -> None:
    strict, flexible = text(0, "4", score=0.0), text(0, "4")
    named = [latest(strict, filter="strict-match"), latest(flexible, filter="flexible-extract")]
    file = lines(tmp_path / "samples_gsm8k.jsonl", named)
    assert read_samples(file, ANY).rows["score"].tolist() == [0.0]
    assert read_samples(file, LmEvalChoice(filter="flexible-extract")).rows["score"].tolist() == [1.0]
    with pytest.raises(FlexGenError, match="no filter `x`; it has strict-match, flexible-extract"):
        read_samples(file, LmEvalChoice(filter="x"))
    unnamed = lines(tmp_path / "old" / "samples_gsm8k.jsonl", [strict, flexible])
    assert read_samples(unnamed, ANY).rows["score"].tolist() == [0.0]
    piqa = lines(tmp_path / "samples_piqa.jsonl", [latest(SAMPLES[0])])
    assert read_samples(piqa, LmEvalChoice(metric="acc_norm")).rows["score"].tolist() == [0.0]
    with pytest.raises(FlexGenError, match="no metric `f1`; it has acc, acc_norm"):
        read_samples(piqa, LmEvalChoice(metric="f1"))


def test_right_answers_that_a_sample_does_not_name(tmp_path: Path) -> None:
    for target in ("[0, 1]", "word", 7, -1, True, "(" * 300):
        file = lines(tmp_path / "samples_a.jsonl", [latest(choice(0, [-1.0, -2.0])) | {"target": target}])
        found = read_samples(file, ANY).rows
        assert found["logprob"].isna().all(), target
        assert found["length"].tolist() == [0]


@pytest.mark.parametrize(
    "damaged",
    [
        '{"doc_id": 0, "doc": {}, "tar',
        "[1, 2",
        "3",
        "null",
        '{"doc_id": 0}',
        json.dumps(choice(0, [-1.0, -2.0]) | {"resps": [[-1.0]]}),
        json.dumps(choice(0, [-1.0]) | {"resps": [[["x", "False"]]]}),
        json.dumps(choice(0, [-1.0]) | {"resps": [[]]}),
        json.dumps(choice(0, [-1.0]) | {"arguments": "text"}),
        json.dumps(choice(0, [-1.0]) | {"arguments": {}}),
    ],
)
def test_torn_and_foreign_files_are_refused(tmp_path: Path, damaged: str) -> None:
    file = tmp_path / "samples_piqa.jsonl"
    whole = json.dumps(latest(SAMPLES[0]))
    file.write_text(damaged if damaged.startswith("[") else f"{whole}\n{damaged}\n")
    with pytest.raises(CorruptFile) as raised:
        read_samples(file, ANY)
    assert str(raised.value).startswith(str(file))
    assert "--log_samples" in str(raised.value)
    assert damaged.startswith("[") or "line 2" in str(raised.value)


def test_empty_files_and_unclear_folders_are_refused(tmp_path: Path) -> None:
    empty = lines(tmp_path / "empty" / "samples_a.jsonl", [])
    with pytest.raises(CorruptFile, match="holds no samples"):
        read_samples(empty, ANY)
    for date in (DATE, DATE.replace("10", "11")):
        lines(tmp_path / "twice" / f"samples_piqa_{date}.jsonl", SAMPLES)
    with pytest.raises(FlexGenError, match="two files of the task piqa"):
        read_samples(tmp_path / "twice", ANY)
    for model in ("a", "b"):
        lines(tmp_path / "models" / model / "samples_piqa.jsonl", SAMPLES)
    with pytest.raises(FlexGenError, match="several models"):
        read_samples(tmp_path / "models", ANY)


def test_two_models_are_checked(tmp_path: Path) -> None:
    right = [choice(number, [-1.0, -2.0]) for number in range(60)]
    wrong = [choice(number, [-2.0, -1.0]) if number < 20 else sample for number, sample in enumerate(right)]
    before = lines(tmp_path / "before" / "m" / f"samples_piqa_{DATE}.jsonl", [latest(sample) for sample in right])
    after = lines(tmp_path / "after" / "m" / "samples_piqa_2026-11-30T00-00-00.0.jsonl", [latest(sample) for sample in wrong])
    config = parse_config({"gates": {"logprob": {"threshold": 0.1}}})
    (found,) = check(Check(str(before.parents[1]), [str(after)], config))
    words = {verdict.gate: verdict.word for verdict in found.verdicts}
    assert (words["flips"], words["margin"], words["logprob"]) == ("fails", "fails", "fails")
    assert (words["kl"], words["length"], found.status) == ("inconclusive", "inconclusive", 1)
    other = lines(
        tmp_path / "other" / "samples_piqa.jsonl", [latest(sample) | {"arguments": [["x", "y"]] * 2} for sample in right]
    )
    with pytest.raises(NotComparable, match=r"`prompt` differs|no texts"):
        check(Check(str(before), [str(other)], GateConfig()))
