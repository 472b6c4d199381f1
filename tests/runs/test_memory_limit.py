"""Processes under a memory limit, random models, and what the comparisons under a limit make of results."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_helm import Engine, Job
from flexgen_helm.errors import FlexGenError, OutOfSpace
from flexgen_helm.runs.agreement import compare
from flexgen_helm.runs.larger_than_ram import accelerate_side, contenders
from flexgen_helm.runs.larger_than_ram.contenders import Ours, Theirs, Work, run_accelerate
from flexgen_helm.runs.larger_than_ram.report import render
from flexgen_helm.runs.memory_limit import engine_side, process
from flexgen_helm.runs.memory_limit.cgroup import Ended, NotPermitted, memory_group
from flexgen_helm.runs.memory_limit.disk import drop_page_cache
from flexgen_helm.runs.memory_limit.model import Shape, random_prompts, write_random_weights, write_tokenizer
from flexgen_helm.runs.memory_limit.process import Limits, Measured, run_limited
from flexgen_helm.runs.offload_ablation.__main__ import Line, Variant
from flexgen_helm.runs.offload_ablation.__main__ import render as render_line

MIB = 2**20
LIMIT = 64 * MIB
TAKING = "import sys; block = bytearray(int(sys.argv[1]) * 2**20); print('took it')"
SMALL = Shape(400_000, hidden_size=64, intermediate_size=96, head_dim=16, vocab_size=300, max_length=64)


@pytest.fixture
def permitted() -> None:
    """Skips where memory cannot be limited."""
    try:
        with memory_group(LIMIT):
            pass
    except NotPermitted as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model in several shards, with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(["the cat sat on the mat and the dog sat on the log"] * 20, SMALL.vocab_size, folder)
    write_random_weights(SMALL.config(), folder, shard_bytes=100_000)
    return folder


def take(mebibytes: int) -> list[str]:
    return [sys.executable, "-c", TAKING, str(mebibytes)]


@pytest.mark.usefixtures("permitted")
def test_process_that_takes_more_than_the_limit_is_killed_and_told_apart(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with memory_group(LIMIT) as group:
        killed = group.run(take(100), log, {})
        assert "took it" not in log.read_text()
        ended = group.run(take(20), log, {})
        assert "took it" in log.read_text()
        failed = group.run([sys.executable, "-c", "raise SystemExit(7)"], log, {})
    assert (killed.status, killed.out_of_memory) == (-9, True)
    assert (ended.status, ended.out_of_memory) == (0, False)
    assert (failed.status, failed.out_of_memory) == (7, False)


@pytest.mark.usefixtures("permitted")
def test_group_is_removed_with_what_still_runs_in_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with memory_group(LIMIT) as group:
        group.run(["/bin/sh", "-c", "sleep 600 & echo $!"], log, {})
        left = Path(f"/proc/{log.read_text().strip()}/stat")
        assert left.read_text().split()[2] in "RSD"
        (folder,) = own_groups()
    assert not left.exists() or left.read_text().split()[2] in "ZX"
    assert not own_groups()
    left_behind = folder.with_name("flexgen_helm_4194305")  # no process has such a number
    left_behind.mkdir()
    with memory_group(LIMIT):
        assert not left_behind.exists()


def own_groups() -> list[Path]:
    return list(Path("/sys/fs/cgroup").rglob(f"flexgen_helm_{os.getpid()}"))


@pytest.mark.usefixtures("permitted")
def test_failure_of_a_contender_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "direct_read_rate", lambda folder: 1e9)
    command = [sys.executable, "-c", "raise SystemExit('what went wrong')"]
    with pytest.raises(FlexGenError, match="what went wrong"):
        run_limited(command, Limits(LIMIT, 1, (tmp_path,)), tmp_path / "log")


def test_dropped_files_are_not_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "nested" / "weights"
    path.parent.mkdir()
    path.write_bytes(bytes(4 * MIB))
    assert cached_pages(path) > 0
    drop_page_cache(tmp_path)
    assert cached_pages(path) == 0


def cached_pages(path: Path) -> int:
    """Pages of a file in the page cache, as the kernel tells by mincore."""
    import ctypes
    import mmap

    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size, mmap.MAP_SHARED) as mapped:
        states = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
        view = (ctypes.c_char * size).from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), states) == 0
        del view
        return sum(state & 1 for state in states)


def test_random_model_is_one_of_transformers(model: Path) -> None:
    found: Any = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    loaded, report = found
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert len(list(model.glob("*.safetensors"))) > 2
    num_bytes = sum(weight.nbytes for weight in loaded.parameters())
    layer = (num_bytes - 2 * 4 * 64 * SMALL.vocab_size) // loaded.config.num_hidden_layers
    assert SMALL.num_bytes <= num_bytes < SMALL.num_bytes + layer
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(tokenizer.encode("the cat, the log")) == "the cat, the log"
    assert tokenizer.eos_token == "</s>"
    assert len(tokenizer) <= SMALL.vocab_size
    logits = loaded(torch.tensor([[5, 6, 7], [9, 6, 7]])).logits[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-2  # what it predicts depends on the whole prompt


@pytest.mark.parametrize("on_disk", [False, True])
def test_sides_answer_alike(model: Path, tmp_path: Path, on_disk: bool) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate, which comes with the extra `bench`")
    prompts = [prompt[: 5 + i] for i, prompt in enumerate(random_prompts(5, 12, 250))]
    theirs = accelerate_side.answer(
        accelerate_side.Task(
            folder=str(model),
            dtype="float32",
            offload_folder=str(tmp_path / "offload"),
            memory_bytes=200_000 if on_disk else MIB,
            prompts=prompts[:4],
            new_tokens=3,
            threads=1,
        )
    )
    assert ("disk" in theirs.placed) == on_disk
    policy = {"gpu_batch_size": 16, "gpu_batch_tokens": 16, "weights": [0, 0, 1]}
    arguments = {"device": "cpu", "policy": policy, "offload_folder": str(tmp_path / "slabs")}
    ours = engine_side.answer(engine_side.Task(str(model), arguments, prompts, 3, 1))
    agreement = compare(theirs.tokens, ours.tokens, ours.gaps)
    assert agreement.compared == theirs.size == 4
    assert agreement.other == 0
    assert ours.weight_bytes["disk"] > 0
    assert ours.disk_read_bytes >= 2 * ours.weight_bytes["disk"]
    assert ours.disk_rate(decoding=True) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("permitted")
def test_under_any_limit_the_engine_answers_or_says_why(tmp_path: Path) -> None:
    """What the plan leaves out, the kernel takes with SIGKILL: from no room for anything to room for the whole model."""
    shape = Shape(300 * MIB, hidden_size=768, intermediate_size=2048, head_dim=64, vocab_size=2000, max_length=1024)
    write_random_weights(shape.config(), tmp_path)
    arguments = {"device": "cpu", "dtype": "float32", "offload_folder": str(tmp_path / "slabs"), "policy": {}}
    given, result, log = tmp_path / "task", tmp_path / "result", tmp_path / "log"
    given.write_text(json.dumps(asdict(engine_side.Task(str(tmp_path), arguments, random_prompts(12, 600, 2000), 4, 1))))
    outcomes = []
    for limit in range(500, 1300, 150):
        result.unlink(missing_ok=True)
        with memory_group(limit * MIB) as group:
            command = [sys.executable, "-m", engine_side.__name__, str(given), str(result)]
            ended = group.run(command, log, {"OMP_NUM_THREADS": "1"})
        assert not ended.out_of_memory, f"killed under {limit} MiB"
        if ended.status:
            assert re.search(
                r"(PolicyError|OutOfSpace): .*\d [MG]iB.*([Aa]llow|Free) more memory", log.read_text().splitlines()[-1]
            )
        weights = engine_side.read_answers(result).weight_bytes if result.exists() else {}
        outcomes.append(next((tier for tier, count in weights.items() if count), "none"))
    assert outcomes == sorted(outcomes, key=["none", "host", "device"].index)
    assert set(outcomes) == {"none", "host", "device"}


def test_engine_tells_the_gap_between_its_two_best_tokens(model: Path, tmp_path: Path) -> None:
    prompt = random_prompts(1, 9, 250)[0]
    ours = engine_side.answer(engine_side.Task(str(model), {"device": "cpu", "policy": {}}, [prompt], 1, 1))
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([prompt])).logits[0, -1]
    best = logits.topk(2).values
    assert ours.gaps[0] == [pytest.approx(float(best[0] - best[1]), abs=1e-4)]
    with Engine.from_pretrained(str(model), device="cpu") as engine:
        (result,) = engine.run([Job(token_ids=prompt, max_new_tokens=1)], progress=False)
    assert ours.tokens == [result.completions[0].token_ids]


def test_first_difference_decides_whether_it_is_a_tie() -> None:
    found = compare([[1, 2], [1, 3], [4, 9]], [[1, 2], [1, 2], [5, 9], [0, 0]], [[1, 1], [0.5, 1e-5], [0.4, 1e-6], [0, 0]])
    assert (found.equal, found.ties, found.other, found.compared) == (1, 1, 1, 3)
    assert found.smallest_gap == 1e-5  # behind a difference prompts are others


def test_an_answer_of_another_length_is_another_answer() -> None:
    found = compare([[1], [1, 2, 3]], [[1, 2], [1, 2]], [[1, 1e-6], [1, 1e-6]])
    assert (found.equal, found.ties, found.other) == (0, 0, 2)


def batch_of(size: int, seconds: float) -> accelerate_side.Batch:
    return accelerate_side.Batch(2.0, {"cpu": 2, "disk": 6}, seconds, [[1]] * size)


def test_accelerate_tries_batches_until_throughput_falls_or_memory_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: dict[int, float | None] = {1: 10.0, 4: 20.0, 8: 41.0, 16: None}
    result = tmp_path / "result"

    def run_task(module: str, task: accelerate_side.Task, *_: object) -> tuple[Measured, Path]:
        taken = seconds[len(task.prompts)]
        if taken is not None:
            result.write_text(json.dumps(asdict(batch_of(len(task.prompts), taken))))
        return Measured(Ended(0, 1.0, taken is None), 1e9, 1e9, ""), result

    def run() -> Theirs:
        work = Work("part", [[1]] * 20, 1)
        limits = Limits(LIMIT, 1, (tmp_path,))
        return run_accelerate(work, tmp_path, "float32", limits, tmp_path, batch_sizes=[1, 4, 8, 16, 32], memory_bytes=1)

    monkeypatch.setattr(contenders, "run_task", run_task)
    fallen = run()
    assert (len(fallen.batches), fallen.best[1].size, fallen.out_of_memory_at) == (3, 4, None)
    seconds[8] = 30.0
    ended = run()
    assert (len(ended.batches), ended.best[1].size, ended.out_of_memory_at) == (3, 8, 16)
    seconds[1] = None
    with pytest.raises(OutOfSpace, match="Raise --memory"):
        run()


def test_report_compares_with_the_best_batch() -> None:
    measured = Measured(Ended(0, 60.0), 1e9, 1.2e9, "")
    theirs = Theirs([(measured, batch_of(1, 10.0)), (measured, batch_of(4, 20.0))], 16)
    sweeps = [engine_side.Sweep(4.0, 64, 0, 4 * 10**9, "device"), engine_side.Sweep(2.0, 0, 8, 2 * 10**9, "disk_read")]
    stats = {"sweeps": 2, "prompt_tokens_computed": 64, "prompt_tokens_asked": 80, "peak_bytes": 2**30}
    tokens = [[1]] * 8
    weight_bytes = {"device": 1, "host": 0, "disk": 3}
    answers = engine_side.Answers(3.0, 20.0, tokens, [[0.1]] * 8, weight_bytes, stats, 16.0, 30.0, sweeps)
    ours = Ours(Measured(Ended(0, 30.0), 1e9, 1e9, ""), answers)
    text = "\n".join(render(Work("part", tokens, 1), theirs, ours, compare(theirs.best[1].tokens, tokens, answers.gaps)))
    assert "ratio: 2.00 times Accelerate" in text  # 8 in 20 s against 4 in 20 s
    assert "1: 10.0, 4: 20.0, 16: out of memory" in text
    assert "1.00 GB/s, 100% of direct reads" in text  # of the sweep that only decodes
    assert "4 of 4 equal" in text


def test_ablation_shows_a_variant_beside_everything_on() -> None:
    first = Line(Variant("all on"), 10.0, 4.0, 2**30, {"device": 3}, equal=True)
    other = Line(Variant("no overlap"), 20.0, 2.0, 2**31, {"disk_read": 2, "device": 1}, equal=False)
    assert render_line(other, first).split()[:6] == ["no", "overlap", "2.00", "0.50", "2.00", "GiB"]
    assert "ANSWERS DIFFER" in render_line(other, first)
    assert "DIFFER" not in render_line(first, first)
