"""The command for the first minutes on a GPU: its parts in tiny sizes, here and on the simulated one, and its limits."""

from __future__ import annotations

import importlib
import json
import math
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.gpu_check import __main__ as command
from flexgen_helm.runs.gpu_check import bring, commands, forms, process
from flexgen_helm.runs.gpu_check.copies import measure_copies
from flexgen_helm.runs.gpu_check.cpu_attention import _decode_step, measure_cpu_attention
from flexgen_helm.runs.gpu_check.forms import compare_forms
from flexgen_helm.runs.gpu_check.machine import describe_machine
from flexgen_helm.runs.gpu_check.parts import MOST_SECONDS, PARTS, Part
from flexgen_helm.runs.gpu_check.process import measured, run_part
from flexgen_helm.runs.gpu_check.report import page, write_report
from flexgen_helm.runs.gpu_check.sizes import MIB, TINY, Sizes

ON_GPU = replace(TINY, device="cuda", layer_bytes=MIB, piece_bytes=(MIB // 4,))
MACHINE = PARTS[0]


def positive(found: Any) -> bool:
    return all(0 < value < math.inf for value in found.values() if isinstance(value, int | float))


def test_nine_minutes_are_enough() -> None:
    assert sum(part.limit_s for part in PARTS if not part.by_name) <= MOST_SECONDS == 9 * 60


def test_each_result_fits_on_the_page_and_in_the_file(tmp_path: Path) -> None:
    quick = [part for part in PARTS if part.name not in ("tests", "generation", "scoring", "compiled", "cache_tiers")]
    found = {part.name: {"seconds": 1.0, **measured(part, TINY)} for part in quick}
    assert not [of_part for of_part in found.values() if "error" in of_part]
    times = found["kernel"]["result"]["2/1 heads of 16, kv4"]
    assert list(times) == [f"{row}, {how}, ms" for how in ("kernel", "by hand") for row in ("prompts", "decode")]
    assert positive(times)
    assert list(found["kernel"]["result"]["unpacking of w4"]) == ["kernel, ms", "operators, ms"]
    write_report(tmp_path, found)
    assert json.loads((tmp_path / "gpu_check.json").read_text()) == found
    text = (tmp_path / "gpu_check.md").read_text()
    assert f"| torch | {torch.__version__.partition('+')[0]}" in text
    assert text.count("Not run yet.") == len(PARTS) - len(quick)


@pytest.mark.gpu
def test_parts_that_are_functions_run_on_a_gpu() -> None:
    assert describe_machine(ON_GPU)["GPU"] == torch.cuda.get_device_name()
    assert positive(measure_cpu_attention(ON_GPU))
    copies = measure_copies(ON_GPU)
    assert positive(copies)
    assert [row["small copy"] for row in copies["small copies"]] == ["alone", "behind a whole layer", "behind pieces of 0 MiB"]
    assert all(positive(row) for row in copies["small copies"])
    compared = compare_forms(ON_GPU)
    assert [compared[name]["forms"] for name in ("scores, fp32", "values, fp32", "linear, bf16", "linear, fp32")] == [
        3,
        3,
        1,
        1,
    ]


def test_forms_with_other_bits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.nn.functional.linear

    def depends_on_neighbours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return own(x, weight, bias) + (len(x) > 16) * 2.0**-10

    monkeypatch.setattr(forms, "linear", depends_on_neighbours)
    found = compare_forms(TINY)["linear, fp32"]
    assert (found["with other bits"], found["which"]) == (1, "40 tokens")
    assert found["largest difference"] == pytest.approx(2.0**-10, rel=1e-2)


def test_a_function_that_this_torch_lacks_is_said() -> None:
    def lacking() -> Any:
        yield "alone", importlib.import_module("torch.nn.attention").no_such_function

    assert "no_such_function" in forms._compared(lacking())["missing"]


def test_attention_on_the_cpu_is_the_engines() -> None:
    attend, num_bytes = _decode_step(TINY)
    with torch.inference_mode():
        output, lse = attend()
    calls = TINY.num_sequences * TINY.num_chunks
    assert output.shape == (calls, TINY.num_heads, TINY.head_dim)
    assert num_bytes == calls * 128 * 2 * TINY.num_heads * TINY.head_dim * 2
    assert lse.isfinite().all()


@pytest.mark.slow
def test_a_benchmark_gives_its_figures(tmp_path: Path) -> None:
    from tests.models import save_tiny

    tiny = replace(TINY, bench=("--model", str(save_tiny("opt", tmp_path)), "--device", "cpu"))
    found = commands.generate(tiny)
    assert found["throughput"] > 0
    assert (found["attention"], found["bit_stable"]) == ("device", True)
    assert commands.score(tiny)["measurement"]["workload"]["score"]
    assert commands.generate(replace(tiny, generation=("--no-such-option",)))["status"] == 2


@pytest.mark.slow
def test_compiled_layers_are_compared(tmp_path: Path) -> None:
    from tests.models import save_tiny

    tiny = replace(TINY, resident=("--model", str(save_tiny("opt", tmp_path)), *TINY.resident[2:]))
    found = commands.compare_compiled(tiny)["layers"]
    assert [row["layers"] for row in found] == ["as they are", "compiled"]
    assert [row["measurement"]["engine"]["numerics"]["machine"]["compiled"] for row in found] == [False, True]
    assert all(row["throughput"] > 0 for row in found)


@pytest.mark.slow
def test_the_worth_of_a_compressed_cache_is_measured(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_hidden_layers": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path)
    given = ("--model", str(tmp_path), "--vocab-size", "320", "--prompts", "12", "--limit", "9MiB")
    found = commands.compare_caches(replace(TINY, cache_tiers=(*TINY.cache_tiers, *given)))
    assert found["status"] == 0
    assert [row["variant"] for row in found["variants"]] == ["16", "kv4"]
    plain, compressed = found["variants"]
    assert "link_bytes" not in plain
    # Pages of 32 tokens of 4 KiB: of 300 tokens and two that generate, ten.
    assert plain["sequences"] == int(0.95 * 9 * 1024) // 128 // 10
    assert plain["disk_read"] == plain["sequences"] * 10 * 32 * 4096
    assert compressed["sequences"] > plain["sequences"]
    assert 0 < compressed["disk_read"] / compressed["sequences"] < plain["disk_read"] / plain["sequences"]


def test_a_part_that_must_be_named_runs_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(part: Part, *, dry_run: bool) -> dict[str, Any]:
        ran.append(part.name)
        return {"seconds": 1.0, "result": {}}

    monkeypatch.setattr(command, "run_part", run)
    assert command.main(["--dry-run", "--out", str(tmp_path)]) == 0
    assert "cache_tiers" not in ran
    assert command.main(["--dry-run", "--out", str(tmp_path), "--parts", "cache_tiers"]) == 0
    assert ran[-1] == "cache_tiers"


def test_only_files_with_marked_tests_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, mark in (("test_a.py", "gpu"), ("test_b.py", "slow")):
        (tmp_path / name).write_text(f"import pytest\n\n@pytest.mark.{mark}\ndef test_it():\n    assert True\n")
    monkeypatch.setattr(commands, "TESTS", tmp_path)
    assert commands.run_tests(TINY)["status"] == 0
    printed = capfd.readouterr().out
    assert "test_a.py::test_it" in printed
    assert "test_b" not in printed
    monkeypatch.setattr(commands, "TESTS", tmp_path / "gone")
    assert "Run the command in a checkout" in commands.run_tests(TINY)["missing"]


def test_a_part_is_a_process_with_a_time_limit() -> None:
    found = run_part(MACHINE, dry_run=True)
    assert found["result"]["GPU"] == "none"
    begun = time.monotonic()
    assert run_part(replace(MACHINE, limit_s=0), dry_run=True)["error"] == "not done within 0 s"
    assert time.monotonic() - begun < 60


def test_a_part_that_fails_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(sizes: Sizes) -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'greenlet'")

    found = measured(Part("some", "Some?", 1, fails), TINY)
    assert found["error"] == "ModuleNotFoundError: No module named 'greenlet'"
    log = capsys.readouterr().err
    assert "in fails" in log
    lines = list(page({"machine": {"seconds": 1.0, **found, "log": log}}))
    assert "\n**ModuleNotFoundError: No module named 'greenlet'**" in lines
    assert log in lines


def test_a_run_that_is_cut_keeps_the_parts_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(part: Part, *, dry_run: bool) -> dict[str, Any]:
        if part is PARTS[2]:
            raise KeyboardInterrupt
        return {"seconds": 1.0, "log": "", "result": {"dry": dry_run}}

    monkeypatch.setattr(command, "run_part", cut)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--dry-run", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/gpu_check.json").read_text())
    assert found == {part.name: {"seconds": 1.0, "log": "", "result": {"dry": True}} for part in PARTS[:2]}


@pytest.mark.parametrize(
    ("found", "status"),
    [({"result": {"a": 1}}, 0), ({"error": "no", "log": ""}, 1), ({"result": {"status": 1}, "log": "torn"}, 1)],
)
def test_the_exit_status_says_whether_all_succeeded(
    found: dict[str, Any], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_part", lambda part, dry_run: {"seconds": 1.0, **found})
    assert command.main(["--dry-run", "--out", str(tmp_path), "--parts", "machine", "copies"]) == status
    assert "error" in found or "copies" in (tmp_path / "gpu_check.json").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == ("torch sees no CUDA GPU on this machine, so there is nothing to check. Try --dry-run.\n")
    assert not list(tmp_path.iterdir())


REQUIREMENTS = {
    "root": ["torch>=2", "A_b>1", 'c; python_version < "3.11"', 'd; extra == "more"'],
    "a-b": ["e", "root"],
    "e": None,
}


def test_what_is_packed_is_what_is_needed_beside_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> Any:
        if name not in REQUIREMENTS:
            raise PackageNotFoundError(name)
        return SimpleNamespace(version=f"1.{len(name)}", requires=REQUIREMENTS[name])

    monkeypatch.setattr(bring, "distribution", distribution)
    assert bring.needed(["root"], "3.12") == {"root": "1.4", "a-b": "1.3", "e": "1.1"}
    with pytest.raises(FlexGenError, match="c is not installed here"):
        bring.needed(["root"], "3.10")


def test_too_much_for_the_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(bring, "_pip", lambda *arguments: asked.append(arguments))
    (tmp_path / "some.whl").write_bytes(b"1234")
    assert bring.pack(tmp_path, "3.12") == 4
    assert [arguments[0] for arguments in asked] == ["wheel", "download"]
    names = {word.partition("==")[0] for word in asked[1] if "==" in word}
    assert {"greenlet", "transformers", "tokenizers", "xxhash", "pytest"} <= names
    assert not {"torch", "numpy", "triton", "flexgen-helm"} & names
    monkeypatch.setattr(bring, "MOST_BYTES", 3)
    with pytest.raises(FlexGenError, match="are allowed"):
        bring.pack(tmp_path, "3.12")


def test_pip_says_why_it_failed() -> None:
    with pytest.raises(FlexGenError, match=r"(?s)pip download failed\..*no-such-option"):
        bring._pip("download", "--no-such-option")


def test_the_process_of_a_part_writes_its_result(tmp_path: Path) -> None:
    process.main(["machine", str(tmp_path / "result.json"), "--dry-run"])
    assert json.loads((tmp_path / "result.json").read_text())["result"]["GPU"] == "none"
    assert len(list(tmp_path.iterdir())) == 1
