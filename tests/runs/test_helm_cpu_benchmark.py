from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from flexgen_helm.assets import install_helm_data, smollm2_folder
from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.runs.helm_cpu_benchmark.answers import Answer, Asked, count_tokens, loading_seconds
from flexgen_helm.runs.helm_cpu_benchmark.differences import REASONS, Differences, compare, kinds
from flexgen_helm.runs.helm_cpu_benchmark.entries import Entry
from flexgen_helm.runs.helm_cpu_benchmark.judge import Judge
from flexgen_helm.runs.helm_cpu_benchmark.report import Comparison, Side, render, total_lines
from flexgen_helm.runs.helm_overhead.null_model import save_null_model
from tests.models import save_tiny
from tests.reference import Reference
from tests.tokenizers import save_character_tokenizer


def test_tokens_are_counted_as_distinct_prefixes() -> None:
    chance = random.Random(3)
    for _ in range(50):
        prompts = [[chance.randrange(3) for _ in range(chance.randrange(1, 9))] for _ in range(chance.randrange(1, 12))]
        prefixes = {tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)}
        assert count_tokens(prompts) == (sum(map(len, prompts)), len(prefixes))


HELMS_BLOCKS = """
import time
from helm.common.hierarchical_logger import hlog, htrack_block, setup_default_logging
setup_default_logging()
with htrack_block("Executor.execute"):
    with htrack_block("Loading x (kwargs={}) for HELM tokenizer x with Hugging Face Transformers"):
        pass
    begin = time.time()
    with htrack_block("Loading x (kwargs={}) for HELM model a/x with Hugging Face Transformers"):
        with htrack_block("Loading Hugging Face model x"):
            hlog("inner")
        time.sleep(0.3)
    taken = time.time() - begin
    time.sleep(0.2)
print(taken)
"""


def test_loading_is_read_from_helms_log() -> None:
    process = subprocess.run([sys.executable, "-c", HELMS_BLOCKS], capture_output=True, text=True, check=True)
    taken = float(process.stdout.splitlines()[-1])
    assert 0.3 <= loading_seconds(process.stdout + process.stderr) <= taken + 0.001  # HELM shows milliseconds


@pytest.mark.parametrize(("shown", "seconds"), [("2.003s", 2.003), ("1m3.5s", 63.5), ("1h2m3.0s", 3723.0)])
def test_long_loading_is_read(shown: str, seconds: float) -> None:
    head = "2026-01-01 00:00:00,000 INFO     "
    log = f"{head}  Loading x (kwargs={{}}) for HELM model a/x with {{\n{head}    }} [9s]\n{head}  }} [{shown}]\n"
    assert loading_seconds(log) == pytest.approx(seconds)


def test_log_without_loading_is_refused() -> None:
    with pytest.raises(FlexGenError, match="does not say"):
        loading_seconds("nothing")


GENERATED = Asked("ab", 3, ("\n",), scores_prompt=False)
SCORED = Asked("ab", 0, (), scores_prompt=True)
OURS = Answer("xyz", ("xy", "z"), (-1.0, -2.0), "stop", 0.1)


@pytest.mark.parametrize(
    ("asked", "changes", "expected"),
    [
        (GENERATED, {}, []),
        (GENERATED, {"logprobs": (0.0, 0.0), "finish_reason": None}, ["log-probabilities", "finish reason"]),
        (GENERATED, {"text": "xy"}, ["answer"]),
        (GENERATED, {"tokens": ("xy", " z")}, ["token texts"]),
        (SCORED, {"logprobs": (-1.0, -2.001)}, ["answer"]),
        (SCORED, {"logprobs": (-1.0, -2.0001)}, []),
        (SCORED, {"logprobs": (-1.0,)}, ["answer"]),
    ],
)
def test_kinds_of_differences(asked: Asked, changes: dict[str, Any], expected: list[str]) -> None:
    theirs = replace(OURS, **changes)
    assert kinds(asked, theirs, OURS) == expected


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("qwen2", tmp_path_factory.mktemp("judge"))
    save_character_tokenizer(folder)
    return folder


def test_judge_is_plain_transformers(tiny: Path) -> None:
    judge, reference = Judge(tiny), Reference(tiny, attn_implementation="sdpa")
    ids = judge._tokenizer.encode("Some words: ")
    expected = reference.greedy(ids, 6)
    truth = judge.truth(Asked("Some words: ", 6, (), scores_prompt=False))
    assert truth.text == judge._tokenizer.decode(expected.token_ids)
    torch.testing.assert_close(torch.tensor(truth.logprobs), torch.tensor(expected.logprobs), atol=1e-5, rtol=0)
    assert truth.smallest_margin == pytest.approx(min(expected.margins), abs=1e-5)
    scored = judge.truth(Asked("Some words: ", 0, (), scores_prompt=True))
    torch.testing.assert_close(torch.tensor(scored.logprobs), torch.tensor(reference.score(ids)), atol=1e-5, rtol=0)


def test_text_ends_before_a_stop_string(tiny: Path) -> None:
    judge = Judge(tiny)
    whole = judge.truth(Asked("Some words: ", 6, (), scores_prompt=False)).text
    assert judge.truth(Asked("Some words: ", 6, (whole[2:4],), scores_prompt=False)).text == whole.split(whole[2:4])[0]


def test_wrong_answers_are_found_out(tiny: Path) -> None:
    judge = Judge(tiny)
    asked = Asked("Some words: ", 6, (), scores_prompt=False)
    truth = judge.truth(asked)
    right = Answer(truth.text, (), truth.logprobs, "length", 0.1)
    wrong = replace(right, text="?" + truth.text, logprobs=(0.0,) * 6)
    assert truth.verdict(asked, wrong, right) == "engine"
    assert truth.verdict(asked, right, wrong) == "HELM's client"
    assert truth.verdict(asked, wrong, wrong) == "neither"
    found = compare([(asked, right, right), (asked, wrong, right), (asked, wrong, wrong)], judge)
    assert (found.counts["answer"], found.verdicts) == (1, {"engine": 1})
    assert (found.equal_judged, found.equal_right) == (2, 1)
    assert (found.judged, found.scored_right) == (3, {"HELM's client": 1, "engine": 2})


def test_scores_of_a_part_of_a_prompt_are_wrong(tiny: Path) -> None:
    asked = Asked("Some words: ", 0, (), scores_prompt=True)
    truth = Judge(tiny).truth(asked)
    whole = Answer(asked.prompt, (), truth.logprobs, "length", 0.1)
    assert truth.verdict(asked, replace(whole, logprobs=truth.logprobs[:-1]), whole) == "engine"


def side(model_s: float, wall_s: float, **steps_s: float) -> Side:
    return Side(model_s, wall_s, steps_s)


def test_report_names_ratios_aims_and_steps() -> None:
    entry = Entry("mmlu:subject=anatomy", 4, share_aimed_at=0.85)
    found = Differences(
        {kind: 4 * (kind == "finish reason") for kind in REASONS}, {}, 4, 4, {"HELM's client": 0, "engine": 4}, []
    )
    one = Comparison(entry, 1, 4, 800, 200, side(9.0, 20.0, layers=9.0), side(2.5, 12.0, waiting=2.5, lookup=0.01), found)
    text = "\n".join(render(one))
    assert "4.00:1" in text
    assert "3.60 times, 0.90 of the token ratio (aim 0.85: reached)" in text
    lines = [line.split() for line in total_lines([one, one])]
    assert ["model", "18.0", "5.0"] in lines
    assert ["start", "and", "end", "of", "Python", "22.0", "19.0"] in lines
    assert not any(line[:1] == ["lookup"] for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_command_from_end_to_end(tmp_path: Path) -> None:
    try:
        tokenizer = smollm2_folder()
        install_helm_data(tmp_path / "data")
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))
    model = save_null_model(tmp_path / "null", tokenizer)
    command = [sys.executable, "-m", "flexgen_helm.runs.helm_cpu_benchmark", "-m", "2", "--model", str(model)]
    command += ["--threads", "1", "--entries", "anatomy", "piqa", "--json", str(tmp_path / "result.json")]
    subprocess.run(command, check=True, capture_output=True)
    results = json.loads((tmp_path / "result.json").read_text())
    assert [(name, result["requests"]) for name, result in results.items()] == [("anatomy", 2), ("piqa", 4)]
    for result in results.values():
        for side in ("theirs", "ours"):
            assert 0 < result[side]["model_s"] < result[side]["wall_s"]
        assert result["differences"]["counts"]["finish reason"] == result["requests"]
        assert result["token_ratio"] > 1
    # Likelihoods of a prompt are not sampled.
    assert results["piqa"]["differences"]["counts"]["answer"] == 0
