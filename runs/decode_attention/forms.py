"""What attention of decode rows costs by the form of earlier chunks: exact, sealed with bits of K and V, or read sparsely."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexgen_helm.attention.decode import DecodeAttention, LayerPages, Scoring
from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.attention.sparse_decode import SparseDecode
from flexgen_helm.compression.config import parse
from flexgen_helm.kv_cache.cache_format import CacheFormat
from flexgen_helm.kv_cache.page_format import PageFormat, PageTensors, PlainPart
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, Form, PageMap
from flexgen_helm.schedule.rows import Row, Segment

CAUSAL = MaskRule(lambda q, k: k <= q, True)
CPU = torch.device("cpu")
EXACT = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Forms of all chunks. The other forms have bfloat16 in a query's own chunk."""
SEALED = ["kv8", "kv4", "kv2", "k4v2", "k4", "v4", "s10", "kv8s10", "kv4s10", "s30"]
TOKENS = [544, 2000, 6000]
NUMBERS = 1 << 23
"""Numbers of K and of V each, about, in all sequences of a case: far more than a core's cache holds."""
ROUNDS = 10


@dataclass(frozen=True)
class FormCase:
    """Sequences of equal lengths that share nothing."""

    tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_sequences(self) -> int:
        """As many as fill the case."""
        return max(1, NUMBERS // (self.tokens * self.num_kv_heads * self.head_dim))


CASES = [FormCase(tokens, *heads) for heads in ((9, 3, 64), (32, 8, 128)) for tokens in TOKENS]


@dataclass(frozen=True)
class FormResult:
    """Processor time of one layer's pass, the best of several rounds."""

    case: FormCase
    form: str
    bits: float
    """Stored bits of a number of K and V in earlier chunks, scales included."""
    milliseconds: float
    numbers_a_second: float
    """Numbers of K and V that are read."""
    bytes_a_second: float
    """Stored bytes that are read, as if all chunks were earlier ones."""
    over_bfloat16: float
    """Milliseconds over those of bfloat16."""


class Pass:
    """The pass of a case in one form."""

    def __init__(self, case: FormCase, form: str, exact: PageTensors) -> None:
        """Make the stored pages.

        Args:
            case: The case.
            form: A dtype, or the name of a variant.
            exact: Its pages in bfloat16.
        """
        count = -(-case.tokens // PAGE_TOKENS)
        tables = [list(range(i * count, (i + 1) * count)) for i in range(case.num_sequences)]
        self.pages: dict[Form, LayerPages] = {"exact": LayerPages({"device": exact})}
        self.percent: int | None = None
        if form in EXACT:
            k, v = (x.to(EXACT[form]) for x in exact.tensors)
            self.read = _plain(case, EXACT[form])
            self.pages["exact"] = LayerPages({"device": PageTensors(self.read, k, v)})
        else:
            config = parse(form)
            self.read = CacheFormat(config.k_bits, config.v_bits, config.sparsity).forms(*_tokens(exact))["sealed"]
            self.pages["sealed"] = LayerPages({"device": _sealed(self.read, exact)})
            self.percent = config.sparsity
        self.queries = torch.randn(
            case.num_sequences, case.num_heads, case.head_dim, generator=torch.Generator().manual_seed(0)
        )
        self.scoring: Scoring = {"scale": 1 / math.sqrt(case.head_dim), "softcap": None}
        is_sealed = "sealed" in self.pages
        segments = [Segment((0,), case.tokens - 1, table, exact=table if is_sealed else None) for table in tables]
        row = RowPages(Row("decode", case.num_sequences, segments), {form: PageMap() for form in self.pages})
        self.work = self._sparse(row, self.percent) if self.percent else self._dense(row)

    def milliseconds(self) -> float:
        """Processor time of the pass."""
        begun = time.process_time()
        self.work()
        return 1e3 * (time.process_time() - begun)

    def _dense(self, row: RowPages) -> Callable[[], object]:
        decode = DecodeAttention(1)
        plans = decode.plan(row, CAUSAL)
        return lambda: decode.attend(plans, self.queries, self.pages, **self.scoring)

    def _sparse(self, row: RowPages, percent: int) -> Callable[[], object]:
        sparse = SparseDecode(DecodeAttention(1), percent)
        plans = sparse.plan(row, CAUSAL)
        return lambda: sparse.attend(sparse.choose(plans, self.queries, self.pages, **self.scoring), self.pages)


def measure_forms(case: FormCase, forms: list[str]) -> Iterator[FormResult]:
    """Time the pass in all forms in turn, bfloat16 among them."""
    exact = _random_pages(case)
    passes = {form: Pass(case, form, exact) for form in dict.fromkeys(["bfloat16", *forms])}
    best = dict.fromkeys(passes, math.inf)
    for _ in range(ROUNDS):
        for form, one in passes.items():
            best[form] = min(best[form], one.milliseconds())
    numbers = 2 * case.num_sequences * case.tokens * case.num_kv_heads * case.head_dim
    for form, one in passes.items():
        seconds, bits = best[form] / 1e3, sum(one.read.bits_per_element) / 2
        rates = numbers / seconds, numbers * bits / 8 / seconds
        yield FormResult(case, form, bits, best[form], *rates, best[form] / best["bfloat16"])


def _plain(case: FormCase, dtype: torch.dtype) -> PageFormat:
    part = PlainPart(case.num_kv_heads, case.head_dim, dtype)
    return PageFormat(part, part)


def _random_pages(case: FormCase) -> PageTensors:
    pages = _plain(case, torch.bfloat16).allocate(-(-case.tokens // PAGE_TOKENS) * case.num_sequences, CPU)
    for x in pages.tensors:
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    return pages


def _sealed(form: PageFormat, exact: PageTensors) -> PageTensors:
    pages = form.allocate(len(exact.k), CPU)
    numbers: Tensor = torch.arange(len(exact.k))
    for (part, stored), x in zip(pages.sealable_parts, exact.tensors, strict=True):
        part.seal(stored, numbers, x)
    if form.mean is None:
        return pages
    means = form.mean.allocate(len(exact.k), CPU)
    form.mean.store(means, numbers, exact.v)
    return replace(pages, mean=means)


def _tokens(pages: PageTensors) -> tuple[Tensor, Tensor]:
    """K and V ``[32, heads, dim]`` of a page."""
    return pages.k[0].transpose(0, 1), pages.v[0].transpose(0, 1)
