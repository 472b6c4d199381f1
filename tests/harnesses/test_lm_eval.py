"""lm-eval with the engine as its model, against its own Hugging Face backend."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval, which comes with the extra `lm-eval`; make test-harnesses has it")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from flexgen_helm import FlexGenError, InvalidJob, Job
from flexgen_helm.harnesses.lm_eval_model import FlexGenLM
from flexgen_helm.runs.harness_benchmark.sides import lm_eval_side
from tests.harnesses import page
from tests.harnesses.questions import made_questions

PAIRS = [
    ("The quick brown fox", " jumps over"),
    ("The quick brown fox", " jumps over the lazy dog"),
    ("The quick brown fox ", "jumps"),
    ("Question: What is the capital of France?\nAnswer:", " Paris"),
    ("Question: What is the capital of France?\nAnswer:", " Rome"),
    ("", "The owner"),
    ("naïve café", " Größe 😀"),
    ("<s>The quick", " brown"),
    ("The lazy dog. " * 40, " owner"),
]
"""The last one is longer than the context."""
CONTEXT = 127
"""One less than the engine's, which computes the last token too; with it both backends cut the same tokens off."""


@pytest.fixture(scope="module", params=["chat_model", "bos_model"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def ours(folder: Path) -> Iterator[FlexGenLM]:
    model = FlexGenLM(str(folder), dtype="float32", device="cpu", max_length=CONTEXT)
    yield model
    model.late.close()


@pytest.fixture(scope="module")
def theirs(folder: Path) -> HFLM:
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1, max_length=CONTEXT)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def test_log_probabilities_are_those_of_the_hugging_face_backend(ours: FlexGenLM, theirs: HFLM) -> None:
    found, expected = (model.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True) for model in (ours, theirs))
    assert_same(found, expected)


def test_what_the_model_itself_would_say_is_greedy(ours: FlexGenLM, theirs: HFLM) -> None:
    asked: list[Any] = []
    for context, _ in PAIRS[:5]:
        prompt = ours.tok_encode(context)
        whole = theirs.model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[0].tolist()
        said = whole[len(prompt) :]
        asked += [(None, prompt, said), (None, prompt, [*said[:-1], said[-1] ^ 1]), (None, prompt, [said[0] ^ 1, *said[1:]])]
    found, expected = (model._loglikelihood_tokens(asked, disable_tqdm=True) for model in (ours, theirs))
    assert_same(found, expected)
    assert [greedy for _, greedy in found] == [True, False, False] * 5


def assert_same(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=3e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_log_probabilities_are_the_engines(ours: FlexGenLM) -> None:
    found = ours.loglikelihood(requests("loglikelihood", *PAIRS[:5]), disable_tqdm=True)
    for (context, continuation), (logprob, _) in zip(PAIRS[:5], found, strict=True):
        before, behind = ours._encode_pair(context, continuation)
        (result,) = ours.late.get().run([Job(token_ids=before + behind, score_prompt=True)])
        assert result.prompt_logprobs is not None
        assert logprob == sum(result.prompt_logprobs[len(before) :])


def test_rolling_log_probabilities_are_those_of_the_hugging_face_backend(ours: FlexGenLM, theirs: HFLM) -> None:
    texts = ["The quick brown fox.", "naïve café, Größe — 中文\n" * 30, "x"]
    asked = requests("loglikelihood_rolling", *((text,) for text in texts))
    found, expected = (model.loglikelihood_rolling(asked, disable_tqdm=True) for model in (ours, theirs))
    assert found == pytest.approx(expected, abs=3e-4 * 8, rel=1e-6)


def test_texts_are_those_of_the_hugging_face_backend(ours: FlexGenLM, theirs: HFLM) -> None:
    settings = {"until": ["\n\n", "fox"], "max_gen_toks": 20, "do_sample": False, "top_k": 50}
    contexts = [context for context, _ in PAIRS if context]
    asked = requests("generate_until", *((context, settings) for context in contexts))
    found, expected = (model.generate_until(asked, disable_tqdm=True) for model in (ours, theirs))
    assert found == expected
    assert any(found)


def test_repeated_samples_differ_and_are_the_same_each_time(chat_model: Path) -> None:
    model = FlexGenLM(str(chat_model), device="cpu")
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", *[("The quick", settings)] * 3)
    first, second = (model.generate_until(asked, disable_tqdm=True) for _ in range(2))
    model.late.close()
    assert first == second
    assert len(set(first)) == 3


@pytest.mark.parametrize(("name", "value"), [("repetition_penalty", 1.2), ("num_beams", 4), ("max_length", 9)])
def test_settings_that_cannot_be_honoured_are_refused_by_name(ours: FlexGenLM, name: str, value: float) -> None:
    with pytest.raises(InvalidJob, match=f"`{name}`"):
        ours.generate_until(requests("generate_until", ("The", {"until": [], name: value})), disable_tqdm=True)


def test_options_that_do_not_exist_are_refused_with_a_suggestion(chat_model: Path) -> None:
    with pytest.raises(FlexGenError, match=r"no option 'max_memry'. Did you mean 'max_memory'"):
        FlexGenLM(str(chat_model), max_memry="host=1GiB")


def task_folder(folder: Path) -> Path:
    """A multiple-choice task of twelve made questions with two examples, in files."""
    rows = [
        {
            "question": f"The {word} of the {thing}",
            "choices": [f"is {end}" for end in ("brown", "lazy", "quick")],
            "label": i % 3,
        }
        for i, (word, thing) in enumerate((word, thing) for word in ("dog", "fox", "owner") for thing in "ABCD")
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "made_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "num_fewshot": 2,
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "made_choice.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder


@pytest.fixture
def in_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Evaluates a model on the made task."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    manager = TaskManager(include_path=str(task_folder(tmp_path)), include_defaults=False)

    def evaluate(model: object, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = simple_evaluate(
            model, tasks=["made_choice"], task_manager=manager, bootstrap_iters=0, **options
        )
        return found

    return evaluate


@pytest.mark.parametrize("chat", [False, True])
def test_a_task_has_the_scores_of_the_hugging_face_backend(
    chat_model: Path, in_tasks: Callable[..., dict[str, Any]], chat: bool
) -> None:
    ours = FlexGenLM(str(chat_model), device="cpu")
    theirs = HFLM(pretrained=str(chat_model), dtype="float32", device="cpu")
    found, expected = (in_tasks(model, apply_chat_template=chat) for model in (ours, theirs))
    ours.late.close()
    assert found["results"]["made_choice"] == expected["results"]["made_choice"]
    logged, wanted = (result["samples"]["made_choice"] for result in (found, expected))
    for one, other in zip(logged, wanted, strict=True):
        assert one["arguments"] == other["arguments"]
        assert [logprob for logprob, _ in one["filtered_resps"]] == pytest.approx(
            [logprob for logprob, _ in other["filtered_resps"]], abs=3e-4
        )
    assert "flexgen_helm_numerics" in found["config"]


def test_answers_in_lm_evals_cache_are_not_computed_again(
    chat_model: Path, in_tasks: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    first, second = (FlexGenLM(str(chat_model), device="cpu") for _ in range(2))
    results = [in_tasks(model, use_cache=str(tmp_path / "answers"))["results"] for model in (first, second)]
    assert first.late.loaded is not None
    assert second.late.loaded is None
    first.late.close()
    assert results[0] == results[1]


def test_the_command_of_the_page_writes_results_and_samples(chat_model: Path, tmp_path: Path) -> None:
    (command,) = page.commands("python -m flexgen_helm.harnesses.lm_eval")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(chat_model)
    command = command.replace("my_task", "made_choice").replace("dtype=", "max_memory=host=2GiB,dtype=")
    options = f"--include_path {task_folder(tmp_path)} --limit 5 --log_samples --output_path results"
    finished = page.run(command, tmp_path, [sys.executable], *options.split())
    assert finished.returncode == 0, finished.stderr[-2000:]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    (samples,) = (tmp_path / "results").rglob("samples_*.jsonl")
    found = json.loads(results.read_text())
    assert found["n-samples"]["made_choice"]["effective"] == 5
    assert found["config"]["flexgen_helm_numerics"]["weights"]["scheme"] != "plain"
    assert len(samples.read_text().splitlines()) == 5


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flexgen_helm.harnesses.lm_eval", "run", "--model", "flexgen", "--tasks", "made_choice"]
    command += ["--include_path", str(task_folder(tmp_path)), "--model_args", f"pretrained={tmp_path / 'missing'}"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    assert "missing" in finished.stderr


def test_both_sides_of_the_benchmark_answer_alike(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    task = {"folder": str(chat_model), "questions": str(made_questions(tmp_path)), "scratch": str(tmp_path)}
    (ours,) = lm_eval_side.ways("flexgen", task).values()
    theirs = lm_eval_side.ways("hf", task)
    found, expected = ours(6), theirs["batches of 4"](6)
    assert found.score == expected.score
    for one, other in zip(found.answers, expected.answers, strict=True):
        assert one == pytest.approx(other, abs=3e-4)
