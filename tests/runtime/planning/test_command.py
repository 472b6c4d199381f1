"""The command `flexgen-helm plan`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flexgen_helm.cli import main
from flexgen_helm.loading.source import dtype_name
from flexgen_helm.machine.profile import LayerTime, RowKind
from flexgen_helm.machine.profile_file import write_profile
from flexgen_helm.memory.device import CPU
from flexgen_helm.policy.planner.signature import signature
from flexgen_helm.runtime.planning import command
from flexgen_helm.runtime.planning.command import planned_shapes
from flexgen_helm.runtime.planning.sources import open_source
from flexgen_helm.types import TIERS
from tests.policy.planner.made import cpu

JOBS, PROMPT_LEN, GEN_LEN = 24, 40, 6
WITH_GAINS = {
    "test_json_of_a_config_on_a_machine_in_a_file",
    "test_a_named_machine_in_words",
    "test_a_variant_that_cannot_be_predicted_does_not_hide_the_others",
}
"""Tests of a machine without and with a memory of its own, and of weights of 4 bits for which there is no rate."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A model that is nothing but a config.json."""
    sizes = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, dtype="bfloat16"
    )
    sizes.architectures = ["LlamaForCausalLM"]
    folder = tmp_path / "model"
    sizes.save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder / "config.json"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The profile of a CPU in a file."""
    file = tmp_path / "machine.json"
    write_profile(cpu(ram=2, disk=10), file)
    return file


@pytest.fixture(autouse=True)
def _gains(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves gains out where no test looks at them, for they take several times as long as the plan itself."""
    if request.function.__name__ not in WITH_GAINS:
        monkeypatch.setattr(command, "gains", lambda problem: {})


def plan(config: Path, machine: object, *options: str) -> int:
    sizes = ["--num-jobs", str(JOBS), "--prompt-len", str(PROMPT_LEN), "--gen-len", str(GEN_LEN)]
    return main(["plan", "--model", "tiny", "--config", str(config), "--machine", str(machine), *sizes, *options])


def planned(capsys: pytest.CaptureFixture[str], config: Path, machine: object, *options: str) -> dict[str, Any]:
    assert plan(config, machine, "--json", *options) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_of_a_config_on_a_machine_in_a_file(config: Path, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, config, machine)
    assert (found["model"], found["machine"]) == ("tiny", "cpu")
    assert found["generated_tokens"] == JOBS * GEN_LEN
    assert found["tokens_per_second"] == pytest.approx(JOBS * GEN_LEN / found["seconds"])
    assert found["binding"] == max(found["busy_seconds"], key=found["busy_seconds"].get)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(config.parent), dtype=torch.bfloat16)
    weights = 2 * sum(each.numel() for each in whole.parameters())
    assert set(found["peak_bytes"]) <= set(TIERS)
    assert weights <= sum(found["peak_bytes"].values()) <= 2 * 2**30
    assert found["policy"]["weights"][2] == 0, "what fits stays in memory"
    assert set(found["gains"]) == {"1 GiB more host", "1 GiB more disk", "weights of 4 bits"}


def test_scoring_is_counted_in_prompt_tokens(config: Path, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, config, machine, "--gen-len", "0")
    assert (found["generated_tokens"], found["prompt_tokens"]) == (0, JOBS * PROMPT_LEN)
    assert found["tokens_per_second"] == pytest.approx(JOBS * PROMPT_LEN / found["seconds"])


def test_a_named_machine_in_words(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(config, "t4") == 0
    text = capsys.readouterr().out
    assert text.startswith("tiny on t4 (")
    for line in ("policy: ", "weights: ", "K and V: ", "predicted peaks", "prediction: ", "binding: "):
        assert f"\n{line}" in text


def test_what_the_user_asks_is_kept(config: Path, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, config, machine, "--policy", "weights=0:0:1,gpu_batch_size=16", "--max-memory", "host=1GiB")
    assert found["policy"]["gpu_batch_size"] == 16
    assert found["policy"]["weights"][2] > 0.5, "all but the embedding tables"
    assert found["peak_bytes"]["host"] <= 2**30


def test_a_latency_that_can_be_met_is_met_and_another_is_refused_with_one_that_can(
    config: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(config, machine, "--max-latency", "1e-6") == 2
    error = capsys.readouterr().err
    least = re.search(r"max_latency of 1e-06 s cannot be met\. The least that was found is ([0-9.e-]+) s", error)
    assert least is not None, error
    enough = 1.01 * float(least[1])
    assert planned(capsys, config, machine, "--max-latency", str(enough))["latency_seconds"] <= enough


def test_a_throughput_that_cannot_be_met_is_refused_with_one_that_can(
    config: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(config, machine, "--min-throughput", "1e9") == 2
    error = capsys.readouterr().err
    most = re.search(
        r"min_throughput of 1e\+09 tokens/s cannot be met\. The most that was found is ([0-9.e+]+) tokens/s", error
    )
    assert most is not None, error
    enough = 0.99 * float(most[1])
    assert planned(capsys, config, machine, "--min-throughput", str(enough))["tokens_per_second"] >= enough


def test_plots_are_pictures(config: Path, machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(config, machine, "--plot", str(tmp_path / "plots")) == 0
    files = sorted((tmp_path / "plots").iterdir())
    assert [file.name for file in files] == ["frontier.png", "timeline.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    error = capsys.readouterr().err
    assert all(f"plot: {file}" in error for file in files)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--machine", "t5"), ("t5", "t4", "laptop-8gib")),
        (("--config", "nowhere/config.json"), ("nowhere/config.json",)),
        (("--max-memory", "host=1MiB"), ("memory is what cannot be met", "would fit with")),
    ],
)
def test_mistakes_are_named_with_a_way_out(
    options: tuple[str, ...], words: tuple[str, ...], config: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(config, machine, *options) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_the_fastest_of_the_variants_that_are_allowed_is_planned(
    config: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds = {name: planned(capsys, config, machine, *["--model", name])["tokens_per_second"] for name in ("tiny", "tiny@kv4")}
    with_w4 = planned(capsys, config, machine, "--allow", "kv4", "w4")
    fastest = max(speeds, key=speeds.__getitem__)
    assert with_w4["model"] in (fastest, "tiny@w4")
    assert with_w4["tokens_per_second"] >= max(speeds.values())
    found = {with_w4["model"]: with_w4["tokens_per_second"], **with_w4["others"]}
    assert found.keys() == {"tiny", "tiny@kv4", "tiny@w4"}
    assert {name: found[name] for name in speeds} == speeds
    assert plan(config, machine, "--allow", "w4") == 0
    assert "new tokens/s" in capsys.readouterr().out.splitlines()[-1]


def test_a_variant_that_cannot_be_predicted_does_not_hide_the_others(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = tmp_path / "no_unpacking.json"
    write_profile(replace(cpu(ram=2, disk=10), unpack=()), machine)
    found = planned(capsys, config, machine, "--allow", "w4")
    assert found["model"] == "tiny"
    assert "unpacking w4" in found["refused"]["tiny@w4"]


def test_compiled_layers_are_planned_by_their_own_times_or_refused(
    config: Path, machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(config, machine, "--compile-layers") == 2
    assert "has no times of compiled layers. Leave --compile-layers out, or measure" in capsys.readouterr().err
    rows, source = planned(capsys, config, machine)["policy"], open_source(str(config), "auto", CPU)
    sizes, dtype = signature(planned_shapes(source, None)), dtype_name(source.dtype)
    kinds: tuple[tuple[RowKind, int], ...] = (("prefill", rows["gpu_batch_tokens"]), ("decode", rows["gpu_batch_size"]))
    times = (
        LayerTime(sizes, dtype, kind, tokens, seconds, compiled=seconds < 1) for kind, tokens in kinds for seconds in (0.5, 2.0)
    )
    both = tmp_path / "both.json"
    write_profile(replace(cpu(ram=2, disk=10), layers=tuple(times)), both)
    compiled, plain = (planned(capsys, config, both, *options)["seconds"] for options in (["--compile-layers"], []))
    assert 3 * compiled < plain < 5 * compiled


def test_a_device_of_this_machine_is_refused_beside_another_machine(
    config: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(config, machine, "--device", "cpu") != 0
    assert "Leave one of them out" in capsys.readouterr().err
