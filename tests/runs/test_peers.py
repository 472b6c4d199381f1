"""The comparison with other offloading systems: why a peer is skipped, the table, and a tiny model from end to end."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.larger_than_ram.accelerate_side import Batch
from flexgen_helm.runs.larger_than_ram.contenders import Ours, Theirs, Work
from flexgen_helm.runs.memory_limit.cgroup import Ended, NotPermitted, memory_group
from flexgen_helm.runs.memory_limit.engine_side import Answers
from flexgen_helm.runs.memory_limit.model import write_random_weights
from flexgen_helm.runs.memory_limit.process import Limits, Measured
from flexgen_helm.runs.peers import __main__ as command
from flexgen_helm.runs.peers.contenders import Setting, Skipped, last_line, make_task, offload, probe
from flexgen_helm.runs.peers.model import opt_folder, sized_config
from flexgen_helm.runs.peers.published import PUBLISHED, Figure, read_pipeline
from flexgen_helm.runs.peers.report import as_dict, render, rows_of
from flexgen_helm.runs.peers.sides.deepspeed_side import settings
from flexgen_helm.runs.peers.sides.flexllmgen_side import write_weights

MIB = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random OPT in several shards."""
    folder = tmp_path_factory.mktemp("opt")
    write_random_weights(sized_config(5 * MIB, "float32", width=64), folder, shard_bytes=MIB)
    return folder


@pytest.fixture
def setting(model: Path, tmp_path: Path) -> Setting:
    work = Work("part", [[5] * 8] * 6, 4)
    return Setting(
        model, "float16", work, Limits(64 * MIB, 1, (model,)), tmp_path, 8 * MIB, (1, 2, 4), (3, 2, 20, 80, 0, 100, 0, 100), 60
    )


def interpreter(folder: Path, says: str) -> str:
    """A program that answers every question in the same way."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


def reason(name: str, python: str, setting: Setting) -> str:
    found = probe(name, python, setting)
    assert isinstance(found, Skipped)
    reason: str = found.reason
    return reason


def test_a_peer_that_is_not_installed_is_skipped_with_its_reason(setting: Setting) -> None:
    if importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is installed here")
    assert "No module named 'deepspeed'; name an interpreter that has `deepspeed` with --deepspeed" in reason(
        "deepspeed", sys.executable, setting
    )
    assert "does not run" in reason("deepspeed", str(setting.scratch / "nothing"), setting)


def test_flexllmgen_is_skipped_where_it_cannot_serve(setting: Setting, tmp_path: Path) -> None:
    without, with_gpu = interpreter(tmp_path, '["0.1.8", false]'), tmp_path / "gpu"
    assert "0.1.8 computes on a GPU only" in reason("flexllmgen", without, setting)
    with_gpu.mkdir()
    python = interpreter(with_gpu, '["0.1.8", true]')
    assert probe("flexllmgen", python, setting) == "0.1.8"
    assert "--device-memory" in reason("flexllmgen", python, replace(setting, device_bytes=None))
    assert "float16 alone" in reason("flexllmgen", python, replace(setting, dtype="float32"))
    five = replace(setting, work=replace(setting.work, prompts=[[5]] * 5))
    assert "whole blocks of 6 prompts, and there are 5" in reason("flexllmgen", python, five)
    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    assert "OPT alone" in reason("flexllmgen", python, replace(setting, model=other))


def test_other_peers_need_a_gpu_where_its_memory_is_limited(setting: Setting, tmp_path: Path) -> None:
    python = interpreter(tmp_path, '["1.0", false]')
    assert "sees none" in reason("accelerate", python, setting)
    assert probe("accelerate", python, replace(setting, device_bytes=None)) == "1.0"


def test_deepspeed_offloads_to_disk_what_memory_cannot_hold(setting: Setting, model: Path) -> None:
    assert offload(setting) == "cpu"
    little = replace(setting, limits=replace(setting.limits, memory_bytes=6 * MIB))
    assert offload(little) == "nvme"
    loaded = AutoModelForCausalLM.from_pretrained(model)
    task = make_task(little, 2)
    assert task.largest_parameter == max(weight.numel() for weight in loaded.parameters())
    chosen = settings({**task.__dict__})["zero_optimization"]
    assert chosen["offload_param"]["device"] == "nvme"
    assert chosen["offload_param"]["buffer_size"] >= task.largest_parameter


def test_the_last_line_of_a_log_is_the_reason() -> None:
    assert last_line("Traceback\n  here\nValueError: no\n\n") == "ValueError: no"
    assert last_line("\n") == "it ended without a message"


def test_a_random_opt_is_one_of_transformers(model: Path) -> None:
    found: Any = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    loaded, report = found
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    size = sum(weight.nbytes for weight in loaded.parameters())
    assert 5 * MIB <= size < 5 * MIB + 2 * 12 * 64**2 * 4
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert not loaded.model.decoder.layers[0].fc1.bias.any()
    with pytest.raises(FlexGenError, match="gpt2"):
        opt_folder("gpt2", "float16")


def test_weights_in_flexllmgens_layout(model: Path, tmp_path: Path) -> None:
    """Its names are those of transformers without ``model.``, and the last norm is ``decoder.layer_norm``."""
    write_weights(model, tmp_path / "np")
    decoder = AutoModelForCausalLM.from_pretrained(model).model.decoder
    for name, weight in (
        ("decoder.embed_tokens.weight", decoder.embed_tokens.weight),
        ("decoder.embed_positions.weight", decoder.embed_positions.weight),
        ("decoder.layer_norm.bias", decoder.final_layer_norm.bias),
        ("decoder.layers.1.self_attn.q_proj.weight", decoder.layers[1].self_attn.q_proj.weight),
    ):
        assert np.array_equal(np.load(tmp_path / "np" / name), weight.detach().half().numpy())
    assert len(list((tmp_path / "np").iterdir())) == len(list(decoder.parameters()))


def test_the_table_has_ratios_reasons_and_labels(setting: Setting) -> None:
    measured = Measured(Ended(0, 1.0), 1e9, 1e9, "")
    answers = Answers(
        load_s=1.0,
        seconds=4.0,
        tokens=[[1, 2, 3, 4]] * 6,
        gaps=[[1.0] * 4] * 6,
        weight_bytes={"device": 1, "host": 0, "disk": 3},
        stats={"sweeps": 5},
        bits_per_weight=32.0,
        processor_s=2.0,
    )
    first, second = (Batch(1.0, {}, 4.0, [[1, 2, 3, 4]] * size, 3.0) for size in (1, 2))
    peers = {"accelerate": Theirs([(measured, first), (measured, second)], 4), "deepspeed": Skipped("not here")}
    rows = rows_of(setting.work, Ours(measured, answers), peers)
    pipeline = Figure("pipeline", "2 stages", 1.5, "torchrun ...")
    lines = render("title", rows, [pipeline, *PUBLISHED])
    # The engine makes 24 tokens in 4 s and 2 processor seconds, Accelerate at its best 8 in 4 and 3.
    engine, accelerate, deepspeed = (line.split() for line in lines[2:5])
    assert engine[:9] == ["engine", "6", "4.0", "6.000", "1.00", "2.0", "12.000", "1.00", "1.0"]
    assert accelerate[:9] == ["accelerate", "2", "4.0", "2.000", "3.00", "3.0", "2.667", "4.50", "1.0"]
    assert "device 25%, disk 75%" in lines[2]
    assert "1: 4.0 s, 2: 4.0 s, 4: killed; answers 2 of 2 equal" in lines[3]
    assert " ".join(deepspeed) == "deepspeed skipped: not here"
    assert "torchrun" in lines[6]
    assert all("published: FlexGen paper" in line for line in lines[7:])
    assert sum(line.split()[0] == "Petals" for line in lines[7:]) == 4
    plain = as_dict(rows, [pipeline])
    assert plain["measured"]["deepspeed"] == {"skipped": "not here"}
    assert plain["measured"]["accelerate"]["engine_ratio"] == 3.0
    assert json.loads(json.dumps(plain)) == plain


def test_figures_of_a_pipeline_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.json"
    file.write_text('[{"setting": "2 stages", "tokens_per_second": 1.5, "command": "torchrun"}]')
    assert read_pipeline(file) == [Figure("pipeline", "2 stages", 1.5, "torchrun")]
    file.write_text('{"setting": "2 stages"}')
    with pytest.raises(FlexGenError, match="no figures of a pipeline"):
        read_pipeline(file)


@pytest.mark.slow
def test_a_tiny_model_from_end_to_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate, which comes with the extra `bench`")
    try:
        with memory_group(64 * MIB):
            pass
    except NotPermitted as error:
        pytest.skip(str(error))
    result = tmp_path / "result.json"
    arguments = ["--model", str(model), "--memory", "2GiB", "--prompts", "4", "--prompt-len", "9", "--new-tokens", "3"]
    arguments += ["--batches", "2", "--deepspeed", str(tmp_path / "nothing"), "--json", str(result)]
    monkeypatch.setattr(sys, "argv", ["peers", *arguments])
    assert command.main() == 0
    found = json.loads(result.read_text())["measured"]
    assert found["engine"]["at_a_time"] == 4
    assert found["accelerate"]["at_a_time"] == 2
    assert "answers 2 of 2 equal" in found["accelerate"]["note"] or "ties" in found["accelerate"]["note"]
    assert found["accelerate"]["engine_ratio"] > 0
    assert "does not run" in found["deepspeed"]["skipped"]
    assert found["flexllmgen"]["skipped"]
    assert "published" in capsys.readouterr().out
