"""Attention of rows whose pages rest on other tiers: the bits of rows whose pages are all on the device."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.attention.host import HostAttention
from flexgen_helm.attention.row import RowAttention
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.errors import DiskFull, PolicyError
from flexgen_helm.kv_cache.page_format import CacheKey
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import PagePool, PageStorage, num_pages
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.run_stats import RunStats
from flexgen_helm.schedule.rows import Row, Segment
from tests.attention.test_row import RULES, Heads, Machine, Options, RowKind, dense, num_shared, random_rows

CPU = torch.device("cpu")
NUM_LAYERS = 2
Pieces = list[tuple[int, int, int]]


class TieredMachine(Machine):
    """The sequences of `Machine` in pages of a pool, several layers, each row loaded before the one before it attends."""

    def __init__(
        self, heads: Heads, options: Options, lengths: list[int], prefix: int, pool: PagePool, **cache: object
    ) -> None:
        super().__init__(heads, options, lengths, prefix)
        self.cache = PagedCache({"exact": pool}, **cache)  # type: ignore[arg-type]
        self.device = self.cache.device.torch_device
        shared = num_shared(lengths, prefix)
        first = pool.allocate(num_pages(0, lengths[0]))
        self.tables = [first] + [first[:shared] + pool.allocate(num_pages(0, n) - shared) for n in lengths[1:]]
        self.pool = pool
        self.host: HostAttention | None = None
        """Attends on the CPU to what is on the host, for decode rows."""
        self.layers = [[output.clone() for output in self.outputs] for _ in range(NUM_LAYERS)]

    @torch.inference_mode()
    def sweep(self, rows: list[tuple[RowKind, int, Pieces]], *, ahead: bool = True) -> None:
        """Run rows through all layers, column by column."""
        made = [self._row(*row) for row in rows]
        host = [self.host if row.kind == "decode" and self.cache.device.own_memory else None for row in made]
        pages = [RowPages(row, self.cache.page_maps, host_attends=h is not None) for row, h in zip(made, host, strict=True)]
        staged = 2 * max(len(found.staged["exact"].pages) for found in pages)
        self.cache.reserve({"exact": PageStorage(self.pool.high_water)}, {"exact": staged})
        on_cpu = [row.kind == "decode" and (h is not None or self.device == CPU) for row, h in zip(made, host, strict=True)]
        attentions = [
            RowAttention(found, self.cache, self.device, self.decode if here else None, h)
            for found, here, h in zip(pages, on_cpu, host, strict=True)
        ]
        squares = [(j, k) for j in range(NUM_LAYERS) for k in range(len(rows))]
        for square, following in zip(squares, [*squares[1:], None], strict=True):
            if ahead and following is not None:
                attentions[square[1]].load(square[0])
                attentions[following[1]].load(following[0])
            self._attend(*square, attentions, rows)
            attentions[square[1]].store(square[0])

    def _row(self, kind: RowKind, size: int, pieces: Pieces) -> Row:
        return Row(kind, size, [Segment((0,) * (b - a), a, self.tables[i]) for i, a, b in pieces])

    def _attend(self, j: int, k: int, attentions: list[RowAttention], rows: list[tuple[RowKind, int, Pieces]]) -> None:
        _, size, pieces = rows[k]
        parts = [torch.cat([self.inputs[i][x][a:b] for i, a, b in pieces]) for x in range(3)]
        padded = [torch.cat([part, torch.zeros(size - len(part), *part.shape[1:])]) for part in parts]
        q, key, v = (part.to(self.device) for part in padded)
        rule, scale = RULES[self.options.rule], self.heads.dim**-0.5
        qkv = (q * (j + 1), key + j, v - j)  # no two layers keep the same
        out = attentions[k].attend(CacheKey(j, 0), qkv, rule, scale=scale, softcap=None, sinks=self._sinks())
        offset = 0
        for i, a, b in pieces:
            self.layers[j][i][a:b] = out[offset : offset + b - a]
            offset += b - a

    def _sinks(self) -> Tensor | None:
        return None if self.sinks is None else self.sinks.to(self.device)


SHARES = st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(any).map(lambda x: tuple(n / sum(x) for n in x))


@settings(derandomize=True, max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([Heads(4, 2, 16, 16), Heads(4, 4, 24, 16)]),
    st.builds(Options, st.sampled_from(sorted(RULES)), st.just(None), st.booleans()),
    st.lists(st.integers(1, 400), min_size=1, max_size=4),
    st.sampled_from([0, 40, 200]),
    st.integers(0, 9),
    SHARES,
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
)
def test_answers_do_not_depend_on_where_pages_rest(
    tmp_path: Path,
    heads: Heads,
    options: Options,
    lengths: list[int],
    prefix: int,
    seed: int,
    shares: tuple[float, float, float],
    own_memory: bool,
    ahead: bool,
    num_sweeps: int,
) -> None:
    rows = random_rows(lengths, prefix, seed)
    count = sum(num_pages(0, n) for n in lengths)
    plain = TieredMachine(heads, options, lengths, prefix, PagePool(count))
    pool = PagePool(count, host=count, disk=count, shares=shares)
    tiered = TieredMachine(heads, options, lengths, prefix, pool, device=Device(CPU, own_memory), offload_folder=tmp_path)
    cuts = [len(rows) * i // num_sweeps for i in range(num_sweeps + 1)]
    try:
        for machine in (plain, tiered):
            for begin, end in pairwise(cuts):
                if begin < end:
                    machine.sweep(rows[begin:end], ahead=ahead)
    finally:
        tiered.cache.close()
    expected = [dense(*inputs, options, plain.sinks) for inputs in plain.inputs]
    begins = [0] + [num_shared(lengths, prefix) * 32] * (len(lengths) - 1)
    for i, begin in enumerate(begins):
        assert (expected[i] - plain.layers[0][i])[begin:].abs().max() < 5e-6
        for j in range(NUM_LAYERS):
            assert torch.equal(plain.layers[j][i], tiered.layers[j][i])


def tiered(tmp_path: Path, shares: tuple[float, float, float], **cache: object) -> TieredMachine:
    """Sequences whose pages fill a tier of 60 pages each."""
    pool = PagePool(60, host=60, disk=60, shares=shares, page_bytes=NUM_LAYERS * 2 * 32 * 2 * 16 * 4)
    return TieredMachine(Heads(4, 2, 16, 16), Options(), [200, 170, 100], 0, pool, offload_folder=tmp_path, **cache)


def test_bytes_on_each_link_are_those_of_the_pages_that_are_read_and_written(tmp_path: Path) -> None:
    meter = Meter(CPU)
    machine = tiered(tmp_path, (0.0, 0.5, 0.5), device=Device(CPU, own_memory=True), meter=meter)
    page = 2 * 32 * 2 * 16 * 4
    on = {tier: [t for t in machine.tables if machine.pool.capacities.tier_of(t[0]) == tier] for tier in ("host", "disk")}
    assert sorted(map(len, on["host"] + on["disk"])) == [4, 6, 7]
    meter.begin_run()
    machine.sweep([("prefill", 256, [(0, 0, 199)]), ("prefill", 256, [(1, 0, 169), (2, 0, 80)])])
    machine.sweep([("decode", 16, [(0, 199, 200), (1, 169, 170)])])
    machine.cache.reserve({})
    meter.end_sweep(0, 0, 0)
    stats = RunStats()
    meter.end_run(stats)
    machine.cache.close()
    decoded = {tier: [t for t in on[tier] if t in machine.tables[:2]] for tier in on}
    bytes_read = {tier: NUM_LAYERS * page * sum(map(len, tables)) for tier, tables in decoded.items()}
    written = {
        tier: NUM_LAYERS * page * (sum(min(len(t), 3 if len(t) == 4 else 9) for t in on[tier]) + len(decoded[tier]))
        for tier in on
    }
    assert stats.bytes_moved == {
        "host_to_device": bytes_read["host"] + bytes_read["disk"],
        "disk_read": bytes_read["disk"],
        "device_to_host": written["host"] + written["disk"],
        "disk_write": written["disk"],
    }


@contextmanager
def no_larger_files(num_bytes: int) -> Iterator[None]:
    """Let writes behind this many bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


ROWS: list[tuple[RowKind, int, Pieces]] = [("prefill", 256, [(0, 0, 200)]), ("prefill", 256, [(1, 0, 170)])]


def test_a_disk_that_fills_up_is_an_error_and_no_hang(tmp_path: Path) -> None:
    machine = tiered(tmp_path, (0.0, 0.0, 1.0))

    def fill() -> None:
        machine.sweep(ROWS)
        machine.cache.reserve({})

    with no_larger_files(32768), pytest.raises(DiskFull, match=rf"{tmp_path} cannot be written.*offload_folder"):
        fill()
    machine.sweep(ROWS)  # once there is space again
    machine.sweep([("decode", 16, [(0, 199, 200)])])
    machine.cache.close()


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"needs [\d.]+ GiB in .*, which has [\d.]+ GiB free"):
        PagedCache({"exact": PagePool(0, disk=1 << 30, page_bytes=1 << 20)}, offload_folder=tmp_path)
    with pytest.raises(PolicyError, match="offload_folder"):
        PagedCache({"exact": PagePool(0, disk=1)})


def test_nothing_stays_on_disk(tmp_path: Path) -> None:
    def open_here() -> list[str]:
        names = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
        return [name for name in names if name.startswith(str(tmp_path))]

    machine = tiered(tmp_path, (0.0, 0.0, 1.0))
    machine.sweep(ROWS)
    assert len(open_here()) == 1
    assert not list(tmp_path.iterdir())
    machine.cache.close()
    assert not open_here()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_dtype_stores_k_and_v_in_it_and_answers_in_the_models(tmp_path: Path, dtype: torch.dtype) -> None:
    machine = tiered(tmp_path, (0.4, 0.3, 0.3), dtype=dtype)
    machine.sweep(ROWS)
    assert machine.layers[0][0].dtype == torch.float32
    assert machine.cache.bytes_per_token == {CacheKey(j, 0): 2 * 2 * 16 * 2 for j in range(NUM_LAYERS)}
    q, k, v = (x.to(dtype).float() for x in machine.inputs[1])
    difference = (machine.layers[0][1] - dense(q, k, v, Options(), None)).abs().max()
    assert 1e-5 < difference < 8 * torch.finfo(dtype).eps  # of the products and of the output, below 4
    machine.cache.close()


@pytest.mark.parametrize("shares", [(0.0, 1.0, 0.0), (0.5, 0.5, 0.0), (0.2, 0.4, 0.4)], ids=str)
@pytest.mark.parametrize("rule", ["causal", "sliding"])
def test_attention_on_the_host_has_the_bits_of_attention_on_the_device(
    tmp_path: Path, shares: tuple[float, float, float], rule: str
) -> None:
    """A prefix on one tier and continuations on others, so that some chunks lie on the host only in part."""
    heads, options, lengths, prefix = Heads(6, 2, 16, 16), Options(rule, sinks=True), [600, 280, 300, 170], 160
    plain = TieredMachine(heads, options, lengths, prefix, PagePool(60))
    pool = PagePool(60, host=60, disk=60, shares=shares)
    tiered = TieredMachine(heads, options, lengths, prefix, pool, device=Device(CPU, own_memory=True), offload_folder=tmp_path)
    meter = Meter(CPU)
    tiered.host = HostAttention(meter)
    begins = [0] + [160] * 3
    meter.begin_run()
    for machine in (plain, tiered):
        machine.sweep([("prefill", 1024, [(i, a, n - 5)]) for i, (a, n) in enumerate(zip(begins, lengths, strict=True))])
        for step in range(5, 0, -1):
            machine.sweep([("decode", 16, [(i, n - step, n - step + 1) for i, n in enumerate(lengths)])])
    meter.end_sweep(0, 0, 0)
    stats = RunStats()
    meter.end_run(stats)
    tiered.host.close()
    tiered.cache.close()
    assert stats.bytes_moved["cpu_attention"] > 0
    for j in range(NUM_LAYERS):
        for i, begin in enumerate(begins):
            assert torch.equal(plain.layers[j][i][begin:], tiered.layers[j][i][begin:])


@pytest.mark.gpu
@pytest.mark.parametrize("cpu_attention", [False, True])
def test_tiers_beside_a_gpu(tmp_path: Path, cpu_attention: bool) -> None:
    """Pages that are brought change no bit; attention on the CPU rounds differently."""
    cuda = torch.device("cuda")
    heads, options, lengths = Heads(6, 2, 16, 16), Options(sinks=True), [330, 280, 300, 170]
    plain = TieredMachine(heads, options, lengths, 160, PagePool(60), device=Device(cuda))
    pool = PagePool(60, host=60, disk=60, shares=(0.0, 1.0, 0.0) if cpu_attention else (0.2, 0.4, 0.4))
    tiered = TieredMachine(heads, options, lengths, 160, pool, device=Device(cuda), offload_folder=tmp_path)
    tiered.host = HostAttention(Meter(cuda)) if cpu_attention else None
    begins = [0] + [160] * 3
    for machine in (plain, tiered):
        machine.sweep([("prefill", 1024, [(i, a, n - 5)]) for i, (a, n) in enumerate(zip(begins, lengths, strict=True))])
        for step in range(5, 0, -1):
            machine.sweep([("decode", 16, [(i, n - step, n - step + 1) for i, n in enumerate(lengths)])])
    tiered.cache.close()
    for expected, found in zip(plain.layers, tiered.layers, strict=True):
        for i, begin in enumerate(begins):
            difference = (expected[i] - found[i])[begin:].abs().max()
            assert difference <= (1e-5 if cpu_attention else 0.0)
