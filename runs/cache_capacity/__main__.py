"""How many sequences decode at a time in a cache of a size, by their length and by variant, as the scheduler admits them.

Prompts share nothing; each generates the last 32 tokens of its length. The sizes are those of Llama 3 8B: 32 layers, 8 K/V
heads of 128, bfloat16. Compressed caches hold up to eight pages of a sequence as they are beside the quantised ones. So a
variant gains less than the ratio of bits, and the more the longer sequences are. Nothing is computed.

Command: ``python -m flexgen_helm.runs.cache_capacity --cache-size 16GiB --tokens 544 2000 6000``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from flexgen_helm.compression.config import parse
from flexgen_helm.kv_cache.cache_format import PLAIN_CACHE, CacheFormat
from flexgen_helm.kv_cache.pages import Form, PagePool
from flexgen_helm.memory.amounts import parse_size
from flexgen_helm.runs.command_line import add_json, make_parser, reports_errors, write_json
from flexgen_helm.schedule.packed import PackedScheduler
from flexgen_helm.schedule.rows import Continuation
from flexgen_helm.schedule.work import PromptWork
from flexgen_helm.types import ResolvedPolicy

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 32, 8, 128
NEW_TOKENS = 32
MOST = 4096
"""Sequences that ask to be admitted."""


@dataclass(frozen=True)
class Admitted:
    """Sequences of a length that decode at a time."""

    variant: str
    tokens: int
    sequences: int
    ratio: float
    """Over those of the uncompressed cache."""
    bound: float
    """Ratio of the bits of an element, which long sequences approach."""


@reports_errors
def main() -> int:
    """Count and print a table."""
    parser = make_parser("cache_capacity", __doc__)
    parser.add_argument("--cache-size", type=parse_size, default="16GiB", metavar="SIZE", help="of the cache (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[544, 2000, 6000], metavar="N", help="lengths (%(default)s)")
    parser.add_argument("--variants", nargs="+", default=["kv8", "kv4", "kv2", "kv4s10"], metavar="V", help="as behind an @")
    add_json(parser)
    options = parser.parse_args()
    print("variant   tokens  sequences   ratio   ratio of bits")
    rows = [row for tokens in options.tokens for row in counted(options.cache_size, tokens, options.variants)]
    write_json(options.json, [asdict(row) for row in rows])
    return 0


def counted(cache_size: int, tokens: int, variants: Sequence[str]) -> list[Admitted]:
    """Count the sequences of a length, uncompressed and in each variant, and print a line for each."""
    plain, plain_bytes = admitted(cache_size, tokens, PLAIN_CACHE)
    rows = [Admitted("bfloat16", tokens, plain, 1.0, 1.0)]
    for variant in variants:
        config = parse(variant)
        found, page_bytes = admitted(cache_size, tokens, CacheFormat(config.k_bits, config.v_bits, config.sparsity))
        rows.append(Admitted(variant, tokens, found, found / plain, plain_bytes / page_bytes))
    for row in rows:
        print(f"{row.variant:9} {row.tokens:6} {row.sequences:10} {row.ratio:7.2f} {row.bound:10.2f}")
    return rows


def admitted(cache_size: int, tokens: int, cache_format: CacheFormat) -> tuple[int, int]:
    """Return how many sequences a scheduler admits at once, and the bytes of a page as it is kept, with means."""
    kv = torch.empty(0, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    forms = cache_format.forms(kv, kv)
    sizes: dict[Form, int] = {form: NUM_LAYERS * pages.num_bytes for form, pages in forms.items()}
    kept = forms.get("sealed", forms["exact"])
    pages_size = cache_size * kept.num_bytes // (kept.num_bytes + kept.mean_bytes)
    pools = {form: PagePool(pages_size // size, page_bytes=size) for form, size in sizes.items()}
    policy = ResolvedPolicy(gpu_batch_size=MOST, num_gpu_batches=1, gpu_batch_tokens=4096)
    scheduler = PackedScheduler(policy, block_tokens=MOST * tokens, pools=pools)
    prompts = [(i, *[0] * (tokens - NEW_TOKENS - 1)) for i in range(1, MOST + 1)]
    scheduler.add([PromptWork(prompt, False, [Continuation(NEW_TOKENS)]) for prompt in prompts])
    sweep = scheduler.next_sweep()
    return sweep.num_prompt_tokens // (tokens - NEW_TOKENS), NUM_LAYERS * (kept.num_bytes + kept.mean_bytes)


if __name__ == "__main__":
    sys.exit(main())
