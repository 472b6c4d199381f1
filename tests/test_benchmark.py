"""The benchmark on a tiny model: lengths are those asked for, and its numbers agree with each other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm import Engine, Job, Policy, benchmark
from flexgen_helm.benchmark import Measurement, Workload, measure
from flexgen_helm.cli import main
from flexgen_helm.errors import InvalidJob
from flexgen_helm.run_stats import RunStats, SweepStats
from flexgen_helm.types import EngineInfo, ResolvedPolicy
from tests.helm.fakes import numerics_of
from tests.models import save_tiny

SIZES = "gpu_batch_size=16,gpu_batch_tokens=64,num_gpu_batches=1"
NUMERICS = numerics_of("a")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers often end with an end token."""
    return save_tiny("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(str(folder), device="cpu", policy=Policy(16, 1, 64)) as engine:
        yield engine


def test_prompts_share_nothing_and_come_again_with_their_seed() -> None:
    work = Workload(prompt_len=7, gen_len=3, num_prompts=40)
    prompts = [list(job.token_ids or ()) for job in work.jobs(50, seed=0)]
    assert {len(prompt) for prompt in prompts} == {7}
    assert len({prompt[0] for prompt in prompts}) == 40
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)
    assert work.jobs(50, seed=0) == work.jobs(50, seed=0) != work.jobs(50, seed=1)
    with pytest.raises(InvalidJob, match="cannot all begin differently"):
        work.jobs(39, seed=0)


def test_end_tokens_can_be_ignored_and_change_nothing_before_them(engine: Engine) -> None:
    jobs = Workload(prompt_len=9, gen_len=12, num_prompts=16).jobs(engine.vocab_size, seed=3)
    endless = [result.completions[0] for result in engine.run(jobs)]
    ending = engine.run([Job(token_ids=job.token_ids, max_new_tokens=12) for job in jobs])
    assert {len(completion.token_ids) for completion in endless} == {12}
    assert any(len(result.completions[0].token_ids) < 12 for result in ending)
    for completion, result in zip(endless, ending, strict=True):
        tokens = result.completions[0].token_ids
        assert completion.token_ids[: len(tokens)] == tokens


@pytest.mark.parametrize("score", [False, True])
def test_tokens_are_rates_times_seconds(engine: Engine, score: bool, tmp_path: Path) -> None:
    work = Workload(prompt_len=24, gen_len=5, num_prompts=16, score=score)
    found = measure(engine, work, model="tiny", warm_up=True, trace=tmp_path / "trace.json")
    generated = 16 if score else 16 * 5
    assert found.throughput * found.stats.seconds == pytest.approx(generated)
    assert found.prefill_rate is not None
    assert found.prefill_rate * found.prefill_seconds == pytest.approx(16 * 24)
    decoded = (found.decode_rate or 0) * found.decode_seconds
    assert decoded == pytest.approx(sum(s.generated_tokens for s in found.stats.per_sweep if not s.prompt_tokens))
    assert 0 < found.prefill_seconds + found.decode_seconds <= found.stats.seconds
    assert found.stats.roofline_efficiency is not None
    assert 0 < found.stats.roofline_efficiency < 1
    assert found.stats.limit_seconds == pytest.approx(found.stats.roofline_efficiency * found.stats.seconds)
    sweeps = [
        event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if event.get("cat") == "sweep"
    ]
    assert len(sweeps) == found.stats.sweeps == len(found.stats.per_sweep)
    limits = found.as_dict()["stats"]["per_sweep"]["limit"]["sweeps"]
    assert sum(limit for _, limit, _ in limits) == pytest.approx(found.stats.limit_seconds, rel=1e-3)
    for sweep in found.stats.per_sweep:  # one device, which computes or waits
        assert sweep.busy_seconds["device"] + sum(sweep.device_wait_seconds.values()) == pytest.approx(sweep.seconds)


@pytest.mark.parametrize(
    ("fixed", "per_prompt", "counts"),
    [
        (0.0, 0.001, [1, 256]),  # a block is the most
        (0.0, 1.0, [1, 40]),
        (4.9, 0.1, [1, 8, 56, 213]),  # what is streamed once for all
        (0.0, 90.0, [1]),
        (300.0, 0.0, [1]),
    ],
)
def test_as_many_prompts_are_run_as_fit_into_a_minute(
    fixed: float, per_prompt: float, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On machines on which a run takes a fixed time and some more for each prompt."""
    asked, said = [], list[str]()
    sizes = ResolvedPolicy(gpu_batch_size=64, gpu_batch_tokens=512)

    def run(engine: object, workload: Workload, *, model: str, warm_up: bool) -> Measurement:
        asked.append(workload.num_prompts)
        assert warm_up == (len(asked) == 1)
        stats = RunStats(seconds=fixed + per_prompt * workload.num_prompts)
        return Measurement(model, workload, EngineInfo(sizes, NUMERICS, 16, 16, {}), stats, 0.0)

    class Sizes:
        policy, vocab_size = sizes, 50_000

    monkeypatch.setattr(benchmark, "measure", run)
    found = benchmark.measure_fitting(Sizes(), Workload(512, 32, 1), say=said.append, model="m", warm_up=True)  # type: ignore[arg-type]
    assert asked == counts
    assert found.workload == Workload(512, 32, counts[-1])
    assert len(said) == len(counts)
    assert said[-1].endswith("--num-prompts N chooses another number.")
    total = sum(fixed + per_prompt * count for count in counts)
    assert total < 80 or len(counts) == 1


def test_a_number_of_prompts_that_is_given_wins(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt-len", "20", "--gen-len", "2", "--policy", SIZES, "--device", "cpu", "--num-prompts", "3", "--json"]
    assert main(["bench", "--model", str(folder), *options]) == 0
    printed, said = capsys.readouterr()
    assert json.loads(printed)["workload"]["num_prompts"] == 3
    assert said.startswith(f"{folder}: prompts of 20 tokens, 2 new tokens each, 3 of them\n")
    assert "prompts: " not in said.partition("\n")[2]


def test_the_report_of_a_run_from_disk() -> None:
    """Two sweeps in four seconds: what was moved over its busy time, and what was planned beside what was found."""
    sweeps = [
        SweepStats(0, 3, 1024, 0, 2, {"disk_read": 2**30}, {}, {"disk_read": 1.5, "device": 1}),
        SweepStats(3, 1, 0, 2, 2, {}, {}, {"device": 1}),
    ]
    moved, busy = {"disk_read": 2**30}, {"disk_read": 1.5, "device": 2.0}
    stats = RunStats(2, 1024, 1024, 4, 2, 4.0, 5 * 2**30, 2**30, {"host": 2**30}, moved, busy, 2.0, {"products": 1.0}, sweeps)
    policy = ResolvedPolicy(gpu_batch_size=64, gpu_batch_tokens=512)
    info = EngineInfo(policy, NUMERICS, 16, 16, {}, planned_bytes={"host": 2 * 2**30, "disk": 2**30})
    text = "\n".join(Measurement("m", Workload(512, 2, 2), info, stats, 9.0).lines())
    for line in (
        "throughput      1.00 generated token/s, 256.0 prompt token/s",
        "prefill         341.3 token/s in 3.00 s",
        "decode          2.0 token/s in 1.00 s",
        "limit           50% of",
        "products        25% of",
        "disk read       0.72 GB/s, 1.00 GiB in all",
        "bound by        device in 1 of 2 sweeps",
        "host            1.00 GiB at most, 2.00 GiB planned",
        "disk            0 bytes at most, 1.00 GiB planned",
        "process         5.00 GiB at most, 4.00 GiB more",
    ):
        assert line in text
    waiting = dataclasses.replace(stats, device_wait_seconds={"host": 0.5, "weights": 1.5})
    lines = Measurement("m", Workload(512, 2, 2), info, waiting, 9.0).lines()
    assert "  device waits    50% of the time: weights 1.50 s, the host 0.50 s" in lines
    sparse = dataclasses.replace(stats, bytes_saved={"disk_read": 2**29})
    lines = Measurement("m", Workload(512, 2, 2), info, sparse, 9.0).lines()
    assert "  disk read       0.72 GB/s, 1.00 GiB in all, 0.50 GiB saved by sparsity" in lines


def test_the_command_prints_one_object(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt-len", "20", "--gen-len", "4", "--policy", SIZES, "--device", "cpu", "--dtype", "float32"]
    assert main(["bench", "--model", str(folder), *options, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["workload"] == {"prompt_len": 20, "gen_len": 4, "num_prompts": 16, "score": False}
    assert found["throughput"] * found["latency_seconds"] == pytest.approx(64)
    assert found["engine"]["policy"]["gpu_batch_tokens"] == 64
    assert found["stats"]["prompt_tokens_computed"] == 320
    assert "per_sweep" in found["stats"]
    assert main(["bench", "--model", str(folder), *options, "--trace", str(tmp_path / "no" / "trace.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
