"""DeepSpeed's side, a process of its own for each batch: ZeRO-Inference (ZeRO stage 3, parameters offloaded) and ``generate``.

``python deepspeed_side.py task.json result.json``, by any interpreter that has torch, transformers and deepspeed; on a CPU with
DS_ACCELERATOR=cpu, over Gloo. ``python deepspeed_side.py prepare cpu|nvme`` compiles the operators that DeepSpeed compiles at
its first use.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

WHOLE = 10**12
"""More parameters than any model has."""


def prepare(offload: str) -> None:
    """Join a group of one process, and compile operators."""
    import deepspeed  # type: ignore[import-not-found]

    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(alone)
    deepspeed.init_distributed(deepspeed.get_accelerator().communication_backend_name())
    if offload == "nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder  # type: ignore[import-not-found]

        AsyncIOBuilder().load()


def settings(task: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of ZeRO-Inference: every parameter is fetched for its layer, the next ones ahead."""
    where: dict[str, Any] = {"device": task["offload"], "pin_memory": task["device_bytes"] is not None}
    if task["offload"] == "nvme":
        largest = 2 * task["largest_parameter"]
        where |= {"nvme_path": task["offload_folder"], "buffer_count": 5, "buffer_size": largest}
    stage = {"stage": 3, "offload_param": where, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": WHOLE}
    stage["stage3_prefetch_bucket_size"] = 2 * task["largest_parameter"]
    return {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 1,
        "zero_optimization": stage,
        "fp16": {"enabled": task["dtype"] == "float16"},
        "bf16": {"enabled": task["dtype"] == "bfloat16"},
    }


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Load the model and answer the batch, whose prompts are equally long."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    torch.set_num_threads(task["threads"])
    if task["device_bytes"] is not None:
        torch.cuda.set_per_process_memory_fraction(task["device_bytes"] / torch.cuda.mem_get_info()[1])
    begun = time.perf_counter()
    prepare(task["offload"])
    chosen = settings(task)
    kept = HfDeepSpeedConfig(chosen)  # while it lives, transformers loads into parameters that DeepSpeed holds
    model = AutoModelForCausalLM.from_pretrained(task["folder"], dtype=getattr(torch, task["dtype"])).eval()
    module = deepspeed.initialize(model=model, config_params=chosen)[0].module.eval()
    ids = torch.tensor(task["prompts"], device=deepspeed.get_accelerator().current_device_name())
    new = task["new_tokens"]
    greedy = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    loaded, processor = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        output = module.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    tokens = output[:, ids.shape[1] :].tolist()
    seconds, processor_s = time.perf_counter() - loaded, time.process_time() - processor
    del kept
    placed = {task["offload"]: len(list(model.parameters()))}
    return {"load_s": loaded - begun, "placed": placed, "seconds": seconds, "tokens": tokens, "processor_s": processor_s}


def main(first: str, second: str) -> None:
    """Do what the command line says."""
    if first == "prepare":
        prepare(second)
        return
    found = answer(json.loads(Path(first).read_text(encoding="utf-8")))
    Path(second).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
