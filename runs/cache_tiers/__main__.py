"""What a compressed K/V cache is worth where the cache is on the host or on disk, and its size limits the sequences at a time.

The same prompts are answered by the same model with K and V in 16 bits and compressed, under the same limit of the tier that
holds them (``max_memory``). Rounds take turns, so that a busy machine treats all alike. Weights are made up, and are on the
device; on a CPU the host's cache is read where it lies and its limit counts weights too. Cost on two cores: five minutes.

Command: ``python -m flexgen_helm.runs.cache_tiers --limit 96MiB --json result.json``
On a GPU: ``python -m flexgen_helm.runs.cache_tiers --device cuda --model meta-llama/Llama-3.1-8B --limit 4GiB --prompts 64
--prompt-len 4000 --batch 64 --batch-tokens 4096``
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from flexgen_helm.memory.amounts import parse_size
from flexgen_helm.run_stats import RunStats
from flexgen_helm.runs.command_line import add_json, make_parser, prepare_libraries, reports_errors, write_json
from flexgen_helm.runs.memory_limit.model import random_prompts
from flexgen_helm.runtime.engine import Engine
from flexgen_helm.types import LINKS, TIERS, Job, Policy

PLAIN = "16"
VOCAB_SIZE = 8192
SMALL_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
"""A token has as many bytes of K and V, for those of the weights, as in models without grouped heads."""


@dataclass(frozen=True)
class Line:
    """Measurements of a run of a variant."""

    variant: str
    sequences: int
    """That decode at a time, at most."""
    link_bytes: dict[str, int]
    """Bytes that a sweep moves over each link, the median of sweeps that only decode."""
    tokens_per_second: float
    """Generated tokens over the seconds of the whole run, prompts included."""
    decode_rate: float
    """Generated tokens of sweeps that only decode, over their seconds."""
    cpu_ms: float
    """Processor time of the whole run for a generated token, in milliseconds."""

    @classmethod
    def of(cls, variant: str, stats: RunStats, cpu_seconds: float) -> Line:
        """Take from a run what the table shows."""
        decoding = [sweep for sweep in stats.per_sweep if sweep.decode_tokens and not sweep.prompt_tokens]
        seconds = sum(sweep.seconds for sweep in decoding)
        return cls(
            variant,
            max(sweep.decode_tokens for sweep in stats.per_sweep),
            {link: int(median(sweep.bytes_moved.get(link, 0) for sweep in decoding)) for link in LINKS},
            stats.generated_tokens / stats.seconds,
            sum(sweep.generated_tokens for sweep in decoding) / seconds,
            1e3 * cpu_seconds / stats.generated_tokens,
        )

    def render(self) -> str:
        """Make its row of the table."""
        moved = "".join(f"{self.link_bytes[link] / 2**20:16.1f}" for link in LINKS)
        return (
            f"{self.variant:8}{self.sequences:10}{moved}{self.tokens_per_second:9.1f}{self.decode_rate:9.1f}{self.cpu_ms:9.1f}"
        )


def run_rounds(options: argparse.Namespace, model: str, offload_folder: Path) -> list[Line]:
    """Run all variants in turn, round by round, and print a line for each run."""
    prompts = random_prompts(options.prompts, options.prompt_len, options.vocab_size)
    jobs = [Job(token_ids=prompt, max_new_tokens=options.new_tokens, ignore_eos=True) for prompt in prompts]
    heads = "".join(f"{link.replace('_', ' '):>16}" for link in LINKS)
    print(f"        sequences{heads}  token/s  decode  ms/token   (MiB a sweep that only decodes)", flush=True)
    lines: list[Line] = []
    for _ in range(options.rounds):
        for variant in options.variants:
            lines.append(run_once(options, model, variant, jobs, offload_folder))
            print(lines[-1].render(), flush=True)
            write_json(options.json, [asdict(line) for line in lines])
    return lines


def run_once(options: argparse.Namespace, model: str, variant: str, jobs: list[Job], offload_folder: Path) -> Line:
    """Answer all jobs with a new engine; another short run before loads and compiles what is used."""
    shares = tuple(float(tier == options.tier) for tier in TIERS)
    engine = Engine.from_pretrained(
        model,
        device=options.device,
        dtype=options.dtype,
        compression=None if variant == PLAIN else variant,
        policy=Policy(
            gpu_batch_size=options.batch,
            gpu_batch_tokens=options.batch_tokens,
            weights=(1.0, 0.0, 0.0),
            cache=(shares[0], shares[1], shares[2]),
            cpu_attention=0.0,
        ),
        max_memory={options.tier: options.limit},
        offload_folder=offload_folder,
        dummy_weights=True,
    )
    with engine:
        engine.run([Job(token_ids=jobs[0].token_ids, max_new_tokens=2, ignore_eos=True)])
        begun = time.process_time()
        engine.run(jobs)
        return Line.of(variant, engine.stats, time.process_time() - begun)


def best(lines: Sequence[Line]) -> Iterator[Line]:
    """Yield the fastest run of each variant: the one that others on the machine disturbed least."""
    for variant in dict.fromkeys(line.variant for line in lines):
        yield max((line for line in lines if line.variant == variant), key=lambda line: line.decode_rate)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser: argparse.ArgumentParser = make_parser("cache_tiers", __doc__)
    parser.add_argument("--model", metavar="NAME", help="a config's name or folder (default: a Llama of 4 layers)")
    parser.add_argument("--variants", nargs="+", default=[PLAIN, "kv4", "kv4s10"], metavar="V", help="16 is not compressed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tier", choices=TIERS[1:], help="of the cache (default: disk on a CPU, host on a GPU)")
    parser.add_argument(
        "--limit", type=parse_size, default="96MiB", metavar="SIZE", help="max_memory of the tier (%(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompts", type=int, default=28, metavar="N")
    parser.add_argument("--prompt-len", type=int, default=2000, metavar="TOKENS")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, metavar="N", help="of which prompts are made")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--batch", type=int, default=16, metavar="SEQUENCES", help="gpu_batch_size")
    parser.add_argument("--batch-tokens", type=int, default=512, metavar="TOKENS", help="gpu_batch_tokens")
    parser.add_argument("--rounds", type=int, default=2, metavar="N")
    add_json(parser)
    options = parser.parse_args(arguments)
    options.tier = options.tier or ("disk" if options.device == "cpu" else "host")
    return options


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    options = parse()
    prepare_libraries(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(SMALL_LLAMA), encoding="utf-8")
        lines = run_rounds(options, options.model or name, folder / "pages")
    print("\nFastest of each")
    for line in best(lines):
        print(line.render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
