"""Bytes that travel between host, disk and a device with a memory of its own, with the K/V cache off the device, by variant.

Prompts are windows of the addresses of 2024 and 2026, of which each generates a few tokens. The device is a CPU that takes a
GPU's paths, so bytes are those of a GPU; times are not, and are not printed. Saved is what sparse attention does not read of V,
the numbers of rows that travel with them subtracted.

Command: ``python -m flexgen_helm.runs.cache_traffic --tokens 544 --prompts 2 --json result.json``
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.assets import smollm2_folder
from flexgen_helm.assets.sotu import recent_addresses
from flexgen_helm.memory.device import Device
from flexgen_helm.run_stats import RunStats
from flexgen_helm.runs.command_line import add_json, add_model, make_parser, prepare_libraries, reports_errors, write_json
from flexgen_helm.types import ON_HOST, Shares

VARIANTS = ("bf16", "kv4", "s10", "kv4s10")
PLACES: dict[str, Shares] = {"host": ON_HOST, "disk": (0.0, 0.0, 1.0)}
MB = 1e6


@dataclass(frozen=True)
class Traffic:
    """Bytes of a variant on each link."""

    variant: str
    cache: str
    moved: dict[str, int]
    decode_moved: dict[str, int]
    """Those of sweeps that only decode."""
    saved: dict[str, int]


@reports_errors
def main() -> int:
    """Run all variants and print a table."""
    parser = make_parser("cache_traffic", __doc__)
    add_model(parser)
    parser.add_argument("--tokens", type=int, default=544, metavar="N", help="of a prompt (%(default)s)")
    parser.add_argument("--prompts", type=int, default=2, metavar="N", help="their number (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=8, metavar="N", help="of each (%(default)s)")
    parser.add_argument("--cache", choices=PLACES, default="host", help="where K and V are (%(default)s)")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="V", help="bf16, or as behind the @ of a model")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (%(default)s)")
    add_json(parser)
    options = parser.parse_args()
    prepare_libraries(options.threads)
    model, found = options.model or smollm2_folder(), []
    print("variant   link              moved MB   while decoding   saved MB")
    for variant in options.variants:
        stats = measured(model, variant, options.cache, (options.prompts, options.tokens, options.new_tokens))
        found.append(traffic(variant, options.cache, stats))
        print_links(found[-1])
    write_json(options.json, [asdict(each) for each in found])
    return 0


def measured(model: Path, variant: str, cache: str, sizes: tuple[int, int, int]) -> RunStats:
    """Answer prompts with a variant, and return what was measured.

    Args:
        model: Folder of the model.
        variant: Name of the variant.
        cache: Where K and V are.
        sizes: Number of prompts, tokens of a prompt, new tokens.
    """
    count, length, new_tokens = sizes
    policy = Policy(gpu_batch_size=16, gpu_batch_tokens=256, cache=PLACES[cache], cpu_attention=0.0)
    compression = None if variant == "bf16" else variant
    device = Device(torch.device("cpu"), own_memory=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine.from_pretrained(
            str(model), dtype="bfloat16", compression=compression, policy=policy, device=device, offload_folder=Path(folder)
        ) as engine,
    ):
        assert engine.tokenizer is not None
        tokens = engine.tokenizer(recent_addresses(), add_special_tokens=False)["input_ids"]
        windows = [tokens[i * length : (i + 1) * length] for i in range(count)]
        engine.run([Job(token_ids=window, max_new_tokens=new_tokens, ignore_eos=True) for window in windows], progress=False)
        return engine.stats


def traffic(variant: str, cache: str, stats: RunStats) -> Traffic:
    """Sum up the bytes of a run, of which weights are no part."""
    moved: dict[str, int] = {}
    decoding: dict[str, int] = {}
    for sweep in stats.per_sweep:
        for link, count in sweep.bytes_moved.items():
            moved[link] = moved.get(link, 0) + count - sweep.weight_bytes_moved.get(link, 0)
            if not sweep.prompt_tokens:
                decoding[link] = decoding.get(link, 0) + count - sweep.weight_bytes_moved.get(link, 0)
    return Traffic(variant, cache, moved, decoding, stats.bytes_saved)


def print_links(found: Traffic) -> None:
    """Print a line for each link."""
    for link, moved in found.moved.items():
        saved = found.saved.get(link)
        text = "-" if saved is None else f"{saved / MB:.2f}"
        print(
            f"{found.variant:9} {link:16} {moved / MB:9.2f} {found.decode_moved.get(link, 0) / MB:16.2f} {text:>10}", flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
