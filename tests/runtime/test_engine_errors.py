"""What happens to bad jobs, to their neighbours, and to an engine that is shared, broken into or closed."""

from __future__ import annotations

import math
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flexgen_helm import Engine, Job, Result
from flexgen_helm.errors import CorruptFile, FlexGenError, InvalidJob, JobFailed, OutOfSpace
from flexgen_helm.kv_cache.pages import PAGE_TOKENS
from flexgen_helm.policy.cache_plan import CACHE_SHARE
from flexgen_helm.runtime.intake import Intake, Ticket
from flexgen_helm.types import TIERS
from tests.dimensions import MAX_LENGTH, VOCAB_SIZE
from tests.jobs import MAX_NEW, MAX_PROMPT, fixed_mix
from tests.workbench import POLICY, Workbench

GOOD = Job(token_ids=(5, 6, 7), max_new_tokens=3)
BAD = {
    "no prompt": Job(),
    "prompt twice": Job(prompt="a", token_ids=(5, 6)),
    "empty prompt": Job(token_ids=()),
    "text without a tokenizer": Job(prompt="a b c"),
    "stop without a tokenizer": Job(token_ids=(5, 6), stop=("\n",)),
    "token beyond the vocabulary": Job(token_ids=(5, VOCAB_SIZE)),
    "negative token": Job(token_ids=(-1, 5)),
    "prompt beyond the context": Job(token_ids=(5,) * (MAX_LENGTH + 1), max_new_tokens=0, score_prompt=True),
    "new tokens beyond the context": Job(token_ids=(5,) * 40, max_new_tokens=MAX_LENGTH - 39),
    "negative limit": Job(token_ids=(5, 6), max_new_tokens=-1),
    "negative temperature": Job(token_ids=(5, 6), temperature=-0.5),
    "temperature not a number": Job(token_ids=(5, 6), temperature=float("nan")),
    "top_p zero": Job(token_ids=(5, 6), temperature=1.0, top_p=0.0),
    "top_p above one": Job(token_ids=(5, 6), temperature=1.0, top_p=1.5),
    "nothing asked": Job(token_ids=(5, 6), max_new_tokens=0),
    "no completion": Job(token_ids=(5, 6), num_completions=0),
    "negative candidates": Job(token_ids=(5, 6), top_logprobs=-1),
    "more candidates than tokens": Job(token_ids=(5, 6), top_logprobs=VOCAB_SIZE + 1),
}


@pytest.fixture(scope="module", params=["opt", "nemotron_h"])
def family(request: pytest.FixtureRequest) -> str:
    """One of packed rows and one of single rows."""
    return str(request.param)


@pytest.fixture(scope="module")
def engine(bench: Workbench, family: str) -> Engine:
    return bench.engine(family)


@pytest.mark.parametrize("kind", BAD)
def test_invalid_job_raises_before_the_first_sweep(engine: Engine, kind: str) -> None:
    before = engine.run([GOOD])
    sweeps, answered = engine.stats.sweeps, []
    with pytest.raises(InvalidJob) as error:
        engine.run([GOOD, BAD[kind], GOOD], on_result=lambda index, result: answered.append(index))
    assert len(str(error.value)) > 20
    assert (engine.stats.sweeps, answered) == (sweeps, [])
    with pytest.raises(InvalidJob):
        engine.submit(BAD[kind])
    assert engine.run([GOOD]) == before


def test_errors_are_returned_and_the_others_run(engine: Engine) -> None:
    good = fixed_mix(81, len(BAD))
    mixed = [job for pair in zip(good, BAD.values(), strict=True) for job in pair]
    results = engine.run(mixed, on_error="return")
    assert results[::2] == engine.run(good)
    for result in results[1::2]:
        assert isinstance(result.error, InvalidJob)
        assert result.completions == []


def test_longest_job_that_fits_is_served(engine: Engine) -> None:
    assert engine.max_length == MAX_LENGTH
    result = engine.run([Job(token_ids=(5,) * (MAX_LENGTH - 4), max_new_tokens=4)])[0]
    assert len(result.completions[0].token_ids) == 4


def test_no_jobs(engine: Engine) -> None:
    assert engine.run([]) == []


def test_each_result_is_reported_once(engine: Engine) -> None:
    jobs, seen = [*fixed_mix(83, 20), GOOD, GOOD], dict[int, Result]()

    def note(index: int, result: Result) -> None:
        assert index not in seen
        seen[index] = result

    results = engine.run(jobs, on_result=note)
    assert [seen[index] for index in range(len(jobs))] == results


def test_engine_survives_a_callback_that_raises(engine: Engine) -> None:
    jobs = fixed_mix(85, 20)
    expected = engine.run(jobs)

    def fail(index: int, result: Result) -> None:
        raise RuntimeError("callback failed")

    with pytest.raises(RuntimeError, match="callback failed"):
        engine.run(jobs, on_result=fail)
    assert engine.run(jobs) == expected


@pytest.mark.timeout(120)
def test_submitting_from_many_threads_equals_run(engine: Engine) -> None:
    jobs = fixed_mix(87, 32)
    expected = engine.run(jobs)
    start = threading.Barrier(8)

    def send(part: list[Job]) -> list[Result]:
        start.wait()
        return [future.result(timeout=60) for future in [engine.submit(job) for job in part]]

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(send, [jobs[first::8] for first in range(8)]))
    for first, part in enumerate(parts):
        assert part == expected[first::8]


@pytest.mark.timeout(120)
def test_run_and_submit_at_the_same_time(engine: Engine) -> None:
    jobs, late = fixed_mix(89, 24), fixed_mix(91, 8)
    expected, expected_late = engine.run(jobs), engine.run(late)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.run, jobs)
        futures = [engine.submit(job) for job in late]
        assert [future.result(timeout=60) for future in futures] == expected_late
        assert running.result(timeout=60) == expected


@pytest.mark.timeout(120)
def test_closing(bench: Workbench, family: str) -> None:
    with Engine.from_pretrained(str(bench.folder(family)), dtype="float32", device="cpu", policy=POLICY) as engine:
        futures: list[Future[Result]] = [engine.submit(job) for job in fixed_mix(93, 8)]
    wait(futures, timeout=60)
    for future in futures:
        assert future.cancelled() or (future.done() and isinstance(future.exception(), FlexGenError | None))
    engine.close()
    with pytest.raises(FlexGenError, match="closed"):
        engine.run([GOOD])
    with pytest.raises(FlexGenError, match="closed"):
        engine.submit(GOOD)


@pytest.mark.timeout(120)
def test_closing_ends_what_is_in_flight(bench: Workbench, family: str) -> None:
    long = Job(token_ids=(8, 9), max_new_tokens=MAX_LENGTH - 2)
    with Engine.from_pretrained(str(bench.folder(family)), dtype="float32", device="cpu", policy=POLICY) as engine:
        futures = [engine.submit(long), engine.submit(GOOD)]
        assert len(futures[1].result(timeout=60).completions[0].token_ids) == GOOD.max_new_tokens
    with pytest.raises(FlexGenError, match="closed or interrupted"):
        futures[0].result(timeout=60)


@pytest.mark.timeout(120)
def test_closing_from_another_thread_ends_a_run(bench: Workbench, family: str) -> None:
    engine = Engine.from_pretrained(str(bench.folder(family)), dtype="float32", device="cpu", policy=POLICY)
    jobs = [Job(token_ids=(8, 9, number), max_new_tokens=MAX_LENGTH - 3) for number in range(40)]
    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.run, [GOOD, *jobs], lambda index, result: started.set())
        assert started.wait(60)
        engine.close()
        with pytest.raises(FlexGenError, match="closed or interrupted"):
            running.result(timeout=60)


def test_completions_that_never_fit_together_fail_alone(
    bench: Workbench, engine: Engine, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal prompts are one piece of work: there is memory for each of these jobs, but not for all completions at once."""
    verdict, length, new = engine.self_check, 200, 129
    tokens = length + new + PAGE_TOKENS
    memory = 3 * verdict.cache_bytes_per_sequence + 2 * tokens * verdict.cache_bytes_per_token
    monkeypatch.setattr(
        "flexgen_helm.policy.memory_plan.MemoryPlan.left", lambda *_: dict.fromkeys(TIERS, math.ceil(memory / CACHE_SHARE))
    )
    jobs = [Job(token_ids=(5,) * length, max_new_tokens=new, temperature=1.0, seed=seed) for seed in range(8)]
    with Engine.from_pretrained(str(bench.folder(family)), dtype="float32", device="cpu", policy=POLICY) as small:
        futures = [small.submit(job) for job in [*jobs, GOOD]]
        errors = [future.exception(timeout=60) for future in futures]
        assert [type(error) for error in errors] == [OutOfSpace] * len(jobs) + [type(None)]
        results = small.run([*jobs, GOOD], on_error="return")
        assert [type(result.error) for result in results] == [OutOfSpace] * len(jobs) + [type(None)]
        assert results[-1].completions == engine.run([GOOD])[0].completions
        assert small.run(jobs[:1])[0].completions[0].token_ids


def test_an_answer_that_cannot_be_made_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Intake.result

    def faulty(self: Intake, ticket: Ticket) -> Result:
        if ticket.prepared.job.seed == 13:
            raise ValueError("thirteen")
        return result(self, ticket)

    monkeypatch.setattr(Intake, "result", faulty)
    bad, good = engine.submit(replace(GOOD, seed=13)), engine.submit(GOOD)
    assert len(good.result(timeout=60).completions) == 1
    with pytest.raises(JobFailed, match="ValueError: thirteen"):
        bad.result(timeout=60)


def test_jobs_wait_for_memory_and_one_that_never_fits_is_refused(
    bench: Workbench, engine: Engine, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for two of the longest jobs of the mix."""
    jobs, verdict = fixed_mix(99, 20), engine.self_check
    expected = engine.run(jobs)
    sweeps = engine.stats.sweeps
    memory = 2 * (verdict.cache_bytes_per_sequence + (MAX_PROMPT + MAX_NEW + PAGE_TOKENS) * verdict.cache_bytes_per_token)
    monkeypatch.setattr(
        "flexgen_helm.policy.memory_plan.MemoryPlan.left", lambda *_: dict.fromkeys(TIERS, math.ceil(memory / CACHE_SHARE))
    )
    long = Job(token_ids=(5,) * 300, max_new_tokens=2)
    several = Job(token_ids=(5,) * MAX_PROMPT, max_new_tokens=300, num_completions=5, temperature=1.0)
    with Engine.from_pretrained(str(bench.folder(family)), dtype="float32", device="cpu", policy=POLICY) as small:
        for job in (long, several):
            with pytest.raises(OutOfSpace, match=r"[KM]iB for all jobs"):
                small.run([GOOD, job])
        refused, good = small.run([long, GOOD], on_error="return")
        assert isinstance(refused.error, OutOfSpace)
        assert good == engine.run([GOOD])[0]
        assert small.run(jobs) == expected
        assert small.stats.sweeps > sweeps


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_missing_tensor_is_not_made_up(bench: Workbench, tmp_path: Path, tensor: str) -> None:
    folder = Path(shutil.copytree(bench.folder("llama"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights[tensor]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFile, match=tensor):
        Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY)


def test_torn_weights(bench: Workbench, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bench.folder("llama"), tmp_path / "model"))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFile):
        Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY)


def test_missing_shard(bench: Workbench, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bench.folder("mistral"), tmp_path / "model"))
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(CorruptFile, match=shards[1].name):
        Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(FlexGenError, match="missing"):
        Engine.from_pretrained(str(tmp_path / "missing"), device="cpu")


def test_one_job_without_a_list(bench: Workbench) -> None:
    with pytest.raises(FlexGenError, match=r"engine\.run\(\[job\]\)"):
        bench.engine("llama").run(Job(token_ids=[1, 2]))  # type: ignore[arg-type]


def test_only_a_length_is_explained_by_the_context(bench: Workbench) -> None:
    engine = bench.engine("llama")
    with pytest.raises(InvalidJob, match=r"context holds \d+ tokens \(its config's max_position_embeddings\)"):
        engine.run([Job(token_ids=[1, 2], max_new_tokens=10**6)])
    with pytest.raises(InvalidJob) as caught:
        engine.run([Job(token_ids=[1, 2], stop=("context",))])
    assert "max_position_embeddings" not in str(caught.value)
