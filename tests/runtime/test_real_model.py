"""SmolLM2-135M-Instruct on real prompts: packing changes no bit, and the answers are those of ``transformers``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flexgen_helm import Engine, Job, Policy, Result
from tests.reference import Agreement, Reference

FEW_SHOT = """The following are multiple choice questions (with answers) about geography.

Question: Which river flows through Cairo?
A. The Niger
B. The Nile
C. The Congo
D. The Zambezi
Answer: B

Question: Which of these countries has no coast?
A. Mongolia
B. Portugal
C. Vietnam
D. Kenya
Answer: A

Question: A line on a map that joins points of the same height above the level of the sea is called
A. an isobar, because it shows where the pressure of the air is the same.
B. a meridian, because the sun stands highest at the same time along it.
C. a contour line, because it shows the shape of the land.
D. a watershed, because rivers on its two sides flow to different seas.
Answer: C

Question: Why are deserts often found around thirty degrees north and south of the equator?
A. Cold currents keep all clouds away from the coasts of the continents there.
B. Air that rose near the equator sinks there, becomes warmer and dries.
C. The mountains of these regions are too low for rain to fall.
D. Their soils hold no water, so that nothing evaporates.
Answer: B

Question: {}
A. {}
B. {}
C. {}
D. {}
Answer:"""
QUESTIONS = [
    ("What is the capital of Japan?", "Kyoto", "Osaka", "Tokyo", "Nagoya"),
    ("Which ocean lies west of Chile?", "The Atlantic", "The Pacific", "The Indian", "The Arctic"),
    ("Which is the largest hot desert?", "The Gobi", "The Kalahari", "The Mojave", "The Sahara"),
]
TEXTS = [
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "Q: What is 12 + 30?\nA:",
    "def fibonacci(n):\n",
    "Caf\u00e9s in \u6771\u4eac serve",
]


@pytest.fixture(scope="module")
def tokenizer(real_model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(real_model)
    return loaded


@pytest.fixture(scope="module")
def reference(real_model: Path) -> Reference:
    return Reference(real_model, attn_implementation="sdpa")


@pytest.fixture(scope="module")
def engine(real_model: Path) -> Iterator[Engine]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    policy = Policy(gpu_batch_size=16, num_gpu_batches=2, gpu_batch_tokens=64)
    with Engine.from_pretrained(str(real_model), dtype="float32", device="cpu", policy=policy) as engine:
        yield engine
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def jobs(tokenizer: PreTrainedTokenizerBase) -> list[Job]:
    """Multiple choice behind a shared prefix, scoring, and generation."""
    choices = [tokenizer.encode(FEW_SHOT.format(*question)) for question in QUESTIONS]
    texts = [tokenizer.encode(text) for text in TEXTS]
    return [
        *(Job(token_ids=ids, max_new_tokens=1, top_logprobs=10) for ids in choices),
        *(Job(token_ids=ids, max_new_tokens=0, score_prompt=True) for ids in choices[:2]),
        *(Job(token_ids=ids, max_new_tokens=16, top_logprobs=10, score_prompt=True) for ids in texts),
    ]


@pytest.fixture(scope="module")
def results(engine: Engine, jobs: list[Job]) -> list[Result]:
    return engine.run(jobs)


@pytest.mark.slow
def test_coded_without_loss_real_weights_take_two_thirds_of_the_disk(real_model: Path, jobs: list[Job], tmp_path: Path) -> None:
    policy = Policy(gpu_batch_size=16, gpu_batch_tokens=64, weights=(0, 0, 1), slab_coding="lossless")
    short = [replace(job, max_new_tokens=2) for job in jobs[-len(TEXTS) :]]
    with Engine.from_pretrained(
        str(real_model), dtype="bfloat16", device="cpu", policy=policy, offload_folder=tmp_path
    ) as engine:
        found, shapes = engine.run(short), engine._parts.plan.shapes
        coded = engine.describe().weight_bytes["disk"]
    print(sum(shapes.bound_bytes.values()) / coded, "times fewer bytes")
    assert sum(shapes.bound_bytes.values()) >= 1.4 * coded
    policy = Policy(gpu_batch_size=16, gpu_batch_tokens=64)
    with Engine.from_pretrained(str(real_model), dtype="bfloat16", device="cpu", policy=policy) as engine:
        assert engine.run(short) == found


def test_level_c(results: list[Result], jobs: list[Job], reference: Reference) -> None:
    agreement = Agreement()
    for job, result in zip(jobs, results, strict=True):
        agreement.add(job, result, reference)
    print(agreement)
    assert not agreement.failures, agreement.failures
    assert agreement.tokens > 50


@pytest.mark.slow
def test_level_b(results: list[Result], jobs: list[Job], engine: Engine) -> None:
    assert [engine.run([job])[0] for job in jobs[::4]] == results[::4]  # one of each kind
    assert engine.run(jobs[::-1]) == results[::-1]


def test_shared_prefix_is_computed_once(results: list[Result], jobs: list[Job], engine: Engine) -> None:
    engine.run(jobs[:3])
    nodes = {tuple(job.token_ids[:end]) for job in jobs[:3] if job.token_ids for end in range(1, len(job.token_ids) + 1)}
    assert engine.stats.prompt_tokens_computed == len(nodes) < 0.6 * engine.stats.prompt_tokens_asked
    # So long that keys lie in several splits.
    assert min(len(job.token_ids or []) for job in jobs[:3]) > 256


def test_prompts_as_text_give_the_same_answers(results: list[Result], engine: Engine, jobs: list[Job]) -> None:
    by_text = engine.run([Job(prompt=text, max_new_tokens=16, top_logprobs=10, score_prompt=True) for text in TEXTS])
    assert by_text == results[-len(TEXTS) :]
    for text, result in zip(TEXTS[:4], by_text, strict=False):
        assert "".join(result.prompt_token_texts) == text


def test_text_and_stop_strings(
    results: list[Result], engine: Engine, reference: Reference, tokenizer: PreTrainedTokenizerBase
) -> None:
    jobs, expected = [], []
    for text, result in zip(TEXTS, results[-len(TEXTS) :], strict=True):
        generated = reference.greedy(tokenizer.encode(text), 16).token_ids
        ended = generated[-1] in reference.end_tokens
        whole = tokenizer.decode(generated[:-1] if ended else generated)
        assert result.completions[0].text == whole
        for stop in (whole[3:5], whole[-6:], *("\n" * ("\n" in whole))):
            begin = whole.index(stop)
            kept = next(n for n in range(1, 17) if len(tokenizer.decode(generated[:n])) > begin)
            jobs.append(Job(prompt=text, max_new_tokens=16, stop=(stop, "\u2603")))
            expected.append(("stop", whole[:begin], generated[:kept]))
    completions = [result.completions[0] for result in engine.run(jobs)]
    assert [(c.finish_reason, c.text, c.token_ids) for c in completions] == expected
