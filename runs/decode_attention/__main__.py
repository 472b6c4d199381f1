"""What the attention of a decode step costs on this CPU, a layer: the engine's pass over pages, against a loop of sequences.

The loop calls PyTorch's attention once a sequence, with nothing padded, on K and V that already lie side by side; it says
nothing of where they come from, and promises nothing about bits. The engine's side is everything that a layer does: new K and V
are checked and stored, pages are read where they are, a prefix that sequences share is read once. Outputs are compared.
The second table is of the pass alone, in turn over exact pages and over sealed ones of fewer bits, by the length of sequences.
Cost on one core of a server CPU: about two minutes and 2 GiB of memory.

Command: ``python -m flexgen_helm.runs.decode_attention --threads 1 --json result.json``
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexgen_helm.attention.decode import DecodeAttention
from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.row import RowAttention
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.kv_cache.page_format import CacheKey
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, PageCounts, PageStorage
from flexgen_helm.runs.command_line import add_json, make_parser, prepare_libraries, reports_errors, write_json
from flexgen_helm.runs.decode_attention.forms import CASES as FORM_CASES
from flexgen_helm.runs.decode_attention.forms import EXACT, SEALED, FormResult, measure_forms
from flexgen_helm.schedule.rows import Row, Segment

ROUNDS = 20
CAUSAL = MaskRule(lambda q, k: k <= q, True)
KEY = CacheKey(0, 0)


@dataclass(frozen=True)
class Case:
    """A decode step: sequences of random lengths behind a prefix that all of them share."""

    num_sequences: int
    prefix: int
    own: tuple[int, int]
    """Fewest and most tokens behind the prefix."""
    num_heads: int
    num_kv_heads: int
    head_dim: int


CASES = [
    Case(sequences, prefix, own, *heads)
    for heads in ((9, 3, 64), (32, 8, 128))
    for sequences, prefix, own in ((64, 0, (97, 147)), (64, 608, (20, 150)), (64, 2400, (20, 150)), (32, 0, (10, 600)))
]


@dataclass(frozen=True)
class Result:
    """Milliseconds of processor time of one layer, the best of several rounds."""

    case: Case
    dtype: str
    loop: float
    engine: float
    difference: float
    """Largest difference of an output."""


class Step:
    """One decode step of a case, as both sides compute it."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        chance, torch_chance = random.Random(0), torch.Generator().manual_seed(0)
        self.lengths = [case.prefix + chance.randint(*case.own) for _ in range(case.num_sequences)]
        shared, own = case.prefix // PAGE_TOKENS, -(-case.own[1] // PAGE_TOKENS)
        numbers = list(range(shared, shared + own * case.num_sequences))
        chance.shuffle(numbers)
        self.tables = [[*range(shared), *numbers[i * own : (i + 1) * own]] for i in range(case.num_sequences)]
        size = case.num_sequences
        shapes = [(size, heads, case.head_dim) for heads in (case.num_heads, case.num_kv_heads, case.num_kv_heads)]
        self.q, self.k, self.v = (torch.randn(shape, generator=torch_chance).to(dtype) for shape in shapes)
        self.cache = PagedCache()
        self.cache.reserve({"exact": PageStorage(PageCounts(shared + own * size))})
        self.stored = self.cache.tensors(KEY, self.k, self.v, {"exact": {"device"}})["exact"]["device"]
        for part in self.stored.tensors:
            part.copy_(torch.randn(part.shape, generator=torch_chance))
        segments = [Segment((0,), n - 1, table) for n, table in zip(self.lengths, self.tables, strict=True)]
        pages = RowPages(Row("decode", size, segments), self.cache.page_maps)
        self.attention = RowAttention(pages, self.cache, torch.device("cpu"), DecodeAttention())
        self.engine()  # stores the new tokens, which the loop then finds
        self.contiguous = [
            [x[table].transpose(0, 1).flatten(1, 2)[None, :, :n].contiguous() for x in self.stored.tensors]
            for n, table in zip(self.lengths, self.tables, strict=True)
        ]

    def engine(self) -> Tensor:
        """Attend over pages: ``[sequences, heads, dim]``."""
        scale = 1 / math.sqrt(self.q.shape[-1])
        return self.attention.attend(KEY, (self.q, self.k, self.v), CAUSAL, scale=scale, softcap=None, sinks=None)

    def loop(self) -> Tensor:
        """Attend sequence by sequence: ``[sequences, heads, dim]``."""
        outputs = [
            scaled_dot_product_attention(q[None, :, None], k, v, enable_gqa=True)[0, :, 0]
            for q, (k, v) in zip(self.q, self.contiguous, strict=True)
        ]
        return torch.stack(outputs)


def measure(case: Case, dtype: torch.dtype) -> Result:
    """Time both sides in turn."""
    step = Step(case, dtype)
    best = {"loop": math.inf, "engine": math.inf}
    for _ in range(ROUNDS):
        for name, side in (("loop", step.loop), ("engine", step.engine)):
            best[name] = min(best[name], _milliseconds(side))
    difference = float((step.engine().float() - step.loop().float()).abs().max())
    return Result(case, str(dtype).removeprefix("torch."), best["loop"], best["engine"], difference)


def _milliseconds(work: Callable[[], Tensor]) -> float:
    begun = time.process_time()
    work()
    return 1e3 * (time.process_time() - begun)


def _steps(dtypes: list[str]) -> Iterator[Result]:
    """Print the first table."""
    if dtypes:
        print("sequences  prefix        own       heads  dtype       loop ms  engine ms  loop/engine  difference")
    for dtype in dtypes:
        for case in CASES:
            result = measure(case, getattr(torch, dtype))
            own, heads = "{}..{}".format(*case.own), f"{case.num_heads}/{case.num_kv_heads}x{case.head_dim}"
            print(
                f"{case.num_sequences:9}  {case.prefix:6}  {own:>9}  {heads:>10}  {dtype:9}  {result.loop:8.2f}  "
                f"{result.engine:9.2f}  {result.loop / result.engine:11.2f}  {result.difference:10.1e}",
                flush=True,
            )
            yield result


def _forms(forms: list[str]) -> Iterator[FormResult]:
    """Print the second table."""
    if forms:
        print("tokens  sequences       heads  form       bits      ms  G numbers/s   GB/s  time/bfloat16")
    for case in FORM_CASES if forms else []:
        heads = f"{case.num_heads}/{case.num_kv_heads}x{case.head_dim}"
        for x in measure_forms(case, forms):
            print(
                f"{case.tokens:6}  {case.num_sequences:9}  {heads:>10}  {x.form:8}  {x.bits:5.2f}  {x.milliseconds:6.2f}  "
                f"{x.numbers_a_second / 1e9:11.2f}  {x.bytes_a_second / 1e9:5.2f}  {x.over_bfloat16:13.2f}",
                flush=True,
            )
            yield x


@reports_errors
def main() -> int:
    """Measure all cases and print two tables."""
    parser = make_parser("decode_attention", __doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads of both sides")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], help="dtypes of K and V of the first table")
    parser.add_argument("--forms", nargs="*", default=[*EXACT, *SEALED], help="forms of the second table, beside bfloat16")
    add_json(parser)
    arguments = parser.parse_args()
    prepare_libraries(arguments.threads)
    results: dict[str, list[object]] = {"steps": [], "forms": []}
    with torch.inference_mode():
        for step in _steps(arguments.dtypes):
            results["steps"].append(asdict(step))
        for form in _forms(arguments.forms):
            results["forms"].append(asdict(form))
    write_json(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
