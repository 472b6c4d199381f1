"""FlexLLMGen's side, a process of its own: PyPI's ``flexgen``, which computes on a GPU in float16 and serves OPT alone.

``python flexllmgen_side.py task.json result.json``, by any interpreter that has torch, flexgen and safetensors. Weights are
written into FlexLLMGen's own layout first, one file of numpy for each parameter, beside the result.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

NAME = "model"


def write_weights(folder: Path, target: Path) -> None:
    """Write a checkpoint of transformers as FlexLLMGen reads it."""
    import numpy as np
    from safetensors import safe_open

    target.mkdir(parents=True, exist_ok=True)
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no dictionary
                name = key.removeprefix("model.").replace("decoder.final_layer_norm", "decoder.layer_norm")
                with (target / name).open("wb") as file:
                    np.save(file, tensors.get_tensor(key).half().numpy())


def config_of(folder: Path) -> Any:
    """Return FlexLLMGen's config of a folder's model."""
    from flexgen.opt_config import OptConfig  # type: ignore[import-not-found]

    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return OptConfig(
        name=NAME,
        num_hidden_layers=found["num_hidden_layers"],
        max_seq_len=found["max_position_embeddings"],
        hidden_size=found["hidden_size"],
        input_dim=found["hidden_size"],
        n_head=found["num_attention_heads"],
        ffn_embed_dim=found["ffn_dim"],
        vocab_size=found["vocab_size"],
    )


def answer(task: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Load the model and answer all prompts, which are equally long and fill whole blocks."""
    import torch
    from flexgen.compression import CompressionConfig  # type: ignore[import-not-found]
    from flexgen.flex_opt import OptLM, Policy  # type: ignore[import-not-found]
    from flexgen.pytorch_backend import TorchDevice, TorchDisk, TorchMixedDevice  # type: ignore[import-not-found]
    from flexgen.utils import ExecutionEnv  # type: ignore[import-not-found]

    torch.set_num_threads(task["threads"])
    torch.cuda.set_per_process_memory_fraction(task["device_bytes"] / torch.cuda.mem_get_info()[1])
    folder, begun = Path(task["folder"]), time.perf_counter()
    write_weights(folder, scratch / f"{NAME}-np")
    gpu, cpu, disk = TorchDevice("cuda:0"), TorchDevice("cpu"), TorchDisk(task["offload_folder"])
    env = ExecutionEnv(gpu=gpu, cpu=cpu, disk=disk, mixed=TorchMixedDevice([gpu, cpu, disk]))
    batch, batches, *shares = task["policy"]
    none = CompressionConfig(num_bits=4, group_size=64, group_dim=0, symmetric=False)
    policy = Policy(batch, batches, *shares, True, True, True, False, 1.0, False, none, False, none)
    try:
        model = OptLM(config_of(folder), env, str(scratch), policy)
        loaded, processor, tokens = time.perf_counter(), time.process_time(), []
        for start in range(0, len(task["prompts"]), batch * batches):
            block = task["prompts"][start : start + batch * batches]
            output = model.generate(block, max_new_tokens=task["new_tokens"])
            tokens += [row[len(block[0]) :].tolist() for row in output]
        seconds, processor_s = time.perf_counter() - loaded, time.process_time() - processor
    finally:
        env.close_copy_threads()
    placed = {"gpu": shares[0], "cpu": shares[1], "disk": 100 - shares[0] - shares[1]}
    return {"load_s": loaded - begun, "placed": placed, "seconds": seconds, "tokens": tokens, "processor_s": processor_s}


def main(task_file: str, result_file: str) -> None:
    """Answer a task. Threads of FlexLLMGen would keep a process that failed alive, so it is ended here."""
    try:
        found = answer(json.loads(Path(task_file).read_text(encoding="utf-8")), Path(result_file).parent / "flexllmgen")
        Path(result_file).write_text(json.dumps(found), encoding="utf-8")
    except Exception:  # of a library that this package does not know
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
