"""Single rows on this CPU: how the time per request of a hybrid model falls with the number of requests.

The model has LFM2's layers (short convolutions and attention) with random weights, 183 million in float32: times do not
depend on their values. Each side answers the same prompts, greedily, with as many new tokens as asked: ``generate`` one
request at a time, and the engine 1, 4, 16 and 64 requests at a time. Answers are compared.
Cost on one core of a server CPU: about 5 minutes, 3 GiB of memory and 0.7 GiB of temporary files.

Command: ``python -m flexgen_helm.runs.hybrid_benchmark --threads 1 --json result.json``
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Lfm2Config

from flexgen_helm import Engine
from flexgen_helm.runs.command_line import add_json, make_parser, prepare_libraries, reports_errors, write_json
from flexgen_helm.runs.cpu_benchmark.contenders import Peer, engine_continuations

Answers = list[list[int]]
GROUPS = (1, 4, 16, 64)
PROMPT_LENGTHS = (24, 40)
NUM_PEER_REQUESTS = 8
VOCAB_SIZE = 32_000


def random_hybrid(folder: Path) -> Path:
    """Make a model folder; it has no end token, so that everyone generates as many tokens as asked."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        layer_types=["conv", "conv", "full_attention"] * 4,
        max_position_embeddings=2048,
        eos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def random_prompts(count: int) -> Answers:
    """Prompts of several lengths, nothing shared."""
    chance = random.Random(1)
    low, high = PROMPT_LENGTHS
    return [[chance.randrange(3, VOCAB_SIZE) for _ in range(chance.randrange(low, high))] for _ in range(count)]


def timed(answer: Callable[[Answers], Answers], prompts: Answers, group: int) -> tuple[Answers, float]:
    """Answer prompts, ``group`` at a time; returns the answers and the seconds for each."""
    start = time.perf_counter()
    answers = [found for first in range(0, len(prompts), group) for found in answer(prompts[first : first + group])]
    return answers, (time.perf_counter() - start) / len(prompts)


def measure(folder: Path, new_tokens: int) -> dict[str, float | int]:
    """Seconds for each request, by how they are answered, and how many answers differ."""
    prompts = random_prompts(GROUPS[-1])
    few = prompts[:NUM_PEER_REQUESTS]
    expected, generate = timed(partial(Peer.load(folder).continuations, num_new_tokens=new_tokens), few, 1)
    result: dict[str, float | int] = {"generate": generate, "answers that differ": 0}
    print(f"generate, one at a time    {generate:7.3f} s a request", flush=True)
    with Engine.from_pretrained(str(folder), dtype="float32", device="cpu", rows="single") as engine:
        answer = partial(engine_continuations, engine, num_new_tokens=new_tokens)
        alone = None
        for group in GROUPS:
            answers, seconds = timed(answer, few if group < NUM_PEER_REQUESTS else prompts, group)
            alone = alone or seconds
            result[f"engine, {group} at a time"] = seconds
            result["answers that differ"] += sum(a != b for a, b in zip(expected, answers, strict=False))
            ratios = f"{alone / seconds:5.2f} times one at a time, {generate / seconds:5.2f} times generate"
            print(f"engine, {group:2d} at a time      {seconds:7.3f} s a request: {ratios}", flush=True)
    print(f"answers that differ        {result['answers that differ']} of {len(few) * len(GROUPS)}")
    return result


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    parser = make_parser("hybrid_benchmark", __doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of both sides")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="of each request (%(default)s)")
    add_json(parser)
    options = parser.parse_args()
    prepare_libraries(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(random_hybrid(Path(scratch) / "hybrid"), options.new_tokens)
    write_json(options.json, {"threads": options.threads, **result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
