"""What a row costs in a layer: launches of kernels, copies between host and device, and waits for the device.

The budgets are sums of what the code needs for one row, so that a kernel or a wait that creeps in shows. The jobs are three
prompts of 100 tokens: one chunk of keys for each, one window, one group.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flexgen_helm import Job, Policy
from flexgen_helm.attention.paged.plan import TilePlan
from flexgen_helm.attention.writes import Stores
from flexgen_helm.execution.sweep_run import SweepRun
from flexgen_helm.generation.prepare import prepare
from flexgen_helm.rows import packed
from flexgen_helm.runtime.intake import Intake, Ticket, answer
from flexgen_helm.schedule.operations import Operation, OperationKind
from flexgen_helm.schedule.rows import LogitRequest
from flexgen_helm.schedule.tree import Scores, build_tree
from tests.jobs import random_tokens
from tests.simulated_gpu.engines import POLICY, answers
from tests.simulated_gpu.gpu import Event, SimulatedGpu
from tests.simulated_gpu.patches import simulated_gpu

pytestmark = pytest.mark.usefixtures("one_check")
JOBS = [Job(token_ids=random_tokens(seed, 100), max_new_tokens=3, ignore_eos=True) for seed in range(3)]
ROWS = replace(POLICY, gpu_batch_tokens=512, overlap=False)
FIRST, STEADY, OUTPUT = range(3)
"""The first layer plans, the last one picks what the output head needs; the one of three between them does neither."""

# Launches in a layer of the model's own code.
NORM, LINEAR, ROTATION, SUM = 6, 1, 5, 1
"""A norm: square, mean, epsilon, root, two products. A rotation: two products, half negated and put together, sum."""
AROUND_ATTENTION = 2 * NORM + 4 * LINEAR + 2 * ROTATION + 2 * SUM
MLP = 3 * LINEAR + 2
"""With activation and gate."""
ROUTER = LINEAR + 4
"""Softmax, best, their sum, division."""
EXPERTS, SLICE = 4, 2 * LINEAR + 2
"""Of the tiny model. A slice of an expert's tokens: products, activation and gate."""
SLICES = EXPERTS + 1
"""Of a decoding row at most: its 16 tokens choose two experts each, and slices have 16 tokens."""
LAYOUT = 1 + 3 + 4 + 3 + 1
"""Of tokens by expert: sorted; counted (range, search, differences); padding before each expert (negated, remainder, sums
without its own); rows (range, lookup, sum), back in the order of tokens."""
MIXTURE = ROUTER + LAYOUT + 2 + SLICES * SLICE + 2 + 2
"""Room for inputs and their places in it; outputs side by side and picked; weighted and added up."""

# Launches in a layer of attention.
KEEP = 13
"""K and V: magnitude and peak of both, two limits, and; not, or; two zeros and two choices."""
WRITE = 2
"""K and V go to their pages on the device."""
WINDOW = 2 + 6 + 3
"""Room for outputs and its padding; a merge of one chunk (top, masked; difference, weights, product), its division."""
GATHER = 3 + 2
"""Indices of the pages' heads (range, product, sum), then K and V."""
ATTEND = 2 + 3 + 4 + 4
"""Two products with scale and mask, softmax in four steps, division, log-sum-exp; maxima without keys are masked."""
DECODE = 2 + ATTEND + 2
"""Heads are padded to 16 rows (zeros, copy), and both results are made contiguous for the padding to be dropped."""
PREFILL = 1 + 1 + ATTEND + 4
"""Queries are picked and folded; both results are made contiguous and picked."""
TRANSIENT = 2
"""Room for K and V of prompts, in every layer anew."""
PUT = 2
"""Outputs and log-sum-exps go to their places."""
KERNEL = 2
"""Room for outputs, and the kernel."""
LOCATE = 2
"""Pages become slots, for writing and for reading."""

# Copies, of which none is waited for unless a test says so.
RECORD = 2
"""Tokens with their positions, and the places to which K and V go."""
PLAN_DECODE = 3
"""Of the first layer: positions of queries and chunks, numbers of pages, places without outputs."""
PLAN_PREFILL = PLAN_DECODE + 3
"""Queries of prompts are not neighbours: three indices."""
LAST = 1
"""Which positions the output head needs."""
TABLES = 3
"""Of the kernel's plan: tiles, visits and masks."""
DOWN, UP = 2 + 1, 1
"""Attention on the CPU: K, V and queries go down, outputs come up."""

PICK = 1
"""Of log-probabilities: their values are brought."""
CHOOSE = 1 + PICK
"""The most likely token of each row, its log-probability."""
CANDIDATES, TIED, ON_HOST = 1, 1 + 1, 1
"""The most likely tokens of all rows. Where others are as likely as the last one, they are found and
brought. Logits of the rows that are sampled."""


class Cost(NamedTuple):
    """What operations ask of the device in the thread that computes."""

    launches: int = 0
    copies: int = 0
    waits: int = 0


class Costs:
    """Notes what each row's operations cost."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu = gpu
        self._of: dict[tuple[str, OperationKind, int], list[Cost]] = {}

    def highest(self, row: str, operation: OperationKind, j: int = STEADY) -> Cost:
        """The most that an operation costs rows of a kind in layer j."""
        return Cost(*(max(counts) for counts in zip(*self._of[row, operation, j], strict=True)))

    def note(self, row: str, operation: OperationKind, j: int, events: list[Event]) -> None:
        count = Counter(event.kind for event in events)
        cost = Cost(count["launch"], count["copy"], count["wait"])
        self._of.setdefault((row, operation, j), []).append(cost)

    @contextmanager
    def watch(self, run: SweepRun[Any], operation: Operation) -> Iterator[None]:
        """Note an operation. The self-check is not looked at, which computes in the caller's thread."""
        thread, first = threading.current_thread(), len(self._gpu.log)
        yield
        if thread is not threading.main_thread():
            events = [event for event in self._gpu.log[first:] if event.thread == thread.name]
            self.note(run._sweep.rows[operation.k].kind, operation.kind, operation.j, events)


CostsOf = Callable[..., Costs]
"""Of a family and a policy, maybe of other jobs and a variant."""


@pytest.fixture
def costs_of(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> CostsOf:
    """What a family's rows cost under a policy."""

    def found(family: str, policy: Policy, jobs: list[Job] = JOBS, compression: str | None = None) -> Costs:
        with simulated_gpu() as gpu:
            costs = Costs(gpu)
            record, compute, move = SweepRun.record, SweepRun.compute, SweepRun.move

            def recording(run: SweepRun[Any], k: int) -> None:
                with costs.watch(run, Operation("record", FIRST, k)):
                    record(run, k)

            def computing(run: SweepRun[Any], j: int, k: int) -> None:
                with costs.watch(run, Operation("compute", j, k)):
                    compute(run, j, k)

            def moving(run: SweepRun[Any], operation: Operation) -> Any:
                with costs.watch(run, operation):
                    return move(run, operation)

            monkeypatch.setattr(SweepRun, "record", recording)
            monkeypatch.setattr(SweepRun, "compute", computing)
            monkeypatch.setattr(SweepRun, "move", moving)
            answers(folder_of(family), policy, jobs, compression=compression)
        return costs

    return found


def cost_of_answers(job: Job, logits: Tensor) -> Cost:
    """What a job for each row of logits asks of the device when it is answered."""
    jobs = [replace(job, token_ids=(1, row)) for row in range(len(logits))]
    tickets = [Ticket(prepare(each, tokenizer=None, max_length=99, vocab_size=logits.shape[1])) for each in jobs]
    works = Intake(None, frozenset()).merge(tickets)
    for work, node in zip(works, build_tree([work.tokens for work in works]), strict=True):
        work.node = node
    targets = [((Scores((1, row)), 1),) if job.score_prompt else () for row in range(len(logits))]
    requests = [LogitRequest(row, targets[row], tuple(work.continuations)) for row, work in enumerate(works)]
    with simulated_gpu() as gpu:
        on_gpu, first = logits.to("cuda"), len(gpu.log)
        answer(requests, on_gpu)
        count = Counter(event.kind for event in gpu.log[first:])
        assert not gpu.faults
        del on_gpu
    return Cost(count["launch"], count["copy"], count["wait"])


def assert_within(cost: Cost, budget: Cost) -> None:
    assert all(found <= most for found, most in zip(cost, budget, strict=True)), f"{cost} exceeds {budget}"


def test_rows_on_the_device_never_wait(costs_of: CostsOf) -> None:
    costs = costs_of("llama", ROWS)
    shared = AROUND_ATTENTION + MLP + KEEP + WRITE + WINDOW + GATHER + PUT
    assert_within(costs.highest("decode", "compute"), Cost(shared + DECODE))
    assert_within(costs.highest("prefill", "compute"), Cost(shared + TRANSIENT + PREFILL))
    for row in ("decode", "prefill"):
        assert costs.highest(row, "load_cache") == costs.highest(row, "store_cache") == Cost()
    for row, copies in (("decode", PLAN_DECODE), ("prefill", PLAN_PREFILL)):
        assert costs.highest(row, "compute", FIRST)[1:] == (copies, 0)
        assert costs.highest(row, "compute", OUTPUT)[1:] == (LAST, 0)
        assert costs.highest(row, "record", FIRST)[1:] == (RECORD, 0)


def as_one_kernel(plan: TilePlan, q: Tensor, stores: Stores, *places: Any, **options: Any) -> Tensor:
    """What the kernel asks of the device, without its result."""
    dim = next(iter(stores["exact"].values())).format.v.dim
    return torch.zeros(*q.shape[:2], dim, dtype=q.dtype, device=q.device).add_(0)


def test_the_kernel_is_one_launch_for_any_number_of_chunks(costs_of: CostsOf, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [Job(token_ids=random_tokens(seed, 600), max_new_tokens=3, ignore_eos=True) for seed in range(3)]
    rows = replace(ROWS, gpu_batch_tokens=2048)
    by_hand = costs_of("llama", rows, long)
    monkeypatch.setattr(packed, "_kernel_for", lambda *_: as_one_kernel)
    costs = costs_of("llama", rows, long)
    for row, room in (("decode", 0), ("prefill", TRANSIENT)):
        assert_within(costs.highest(row, "compute"), Cost(AROUND_ATTENTION + MLP + KEEP + WRITE + room + KERNEL))
        assert costs.highest(row, "compute", FIRST)[1:] == (TABLES, 0)
        assert by_hand.highest(row, "compute").launches > 2 * costs.highest(row, "compute").launches


def test_k_and_v_are_brought_without_a_wait(costs_of: CostsOf) -> None:
    """The numbers of the slots are uploaded."""
    costs = costs_of("llama", replace(ROWS, cache=(0, 1, 0), cpu_attention=0))
    shared = AROUND_ATTENTION + MLP + KEEP + WRITE + WINDOW + GATHER + PUT
    assert_within(costs.highest("decode", "compute"), Cost(shared + DECODE + LOCATE))
    assert_within(costs.highest("decode", "load_cache"), Cost(0, 1, 0))
    assert costs.highest("decode", "store_cache") == Cost()


def test_sparse_rows_wait_once_for_what_they_chose(costs_of: CostsOf) -> None:
    """The host must know which rows of V to bring."""
    jobs = [Job(token_ids=random_tokens(1, 140), max_new_tokens=3, ignore_eos=True)]
    beside = costs_of("llama", replace(ROWS, cache=(0, 1, 0), cpu_attention=0), jobs, "s10")
    assert beside.highest("decode", "compute").waits == 1
    assert beside.highest("prefill", "compute").waits == 0
    assert_within(beside.highest("decode", "load_cache"), Cost(0, 2, 0))  # of each form


def test_attention_on_the_cpu(costs_of: CostsOf) -> None:
    costs = costs_of("llama", replace(ROWS, weights=(0, 1, 0), cache=(0, 1, 0), cpu_attention=1))
    assert_within(costs.highest("decode", "compute"), Cost(AROUND_ATTENTION + MLP + KEEP, DOWN + UP, 1))


def test_experts_wait_once_for_their_numbers_of_tokens(costs_of: CostsOf) -> None:
    costs = costs_of("mixtral", ROWS)
    attention = KEEP + WRITE + WINDOW + GATHER + DECODE + PUT
    assert_within(costs.highest("decode", "compute"), Cost(AROUND_ATTENTION + attention + MIXTURE, 1, 1))


@pytest.mark.parametrize(
    ("job", "waits"),
    [
        (Job(max_new_tokens=3), CHOOSE),
        (Job(max_new_tokens=3, top_logprobs=4), CHOOSE + CANDIDATES),
        (Job(max_new_tokens=3, top_logprobs=5), CHOOSE + CANDIDATES + TIED),
        (Job(max_new_tokens=3, temperature=1.0, top_p=0.9), CHOOSE + ON_HOST),
        (Job(max_new_tokens=0, score_prompt=True), PICK),
    ],
    ids=["greedy", "candidates", "tied candidates", "sampled", "scored"],
)
def test_a_slice_of_any_size_is_answered_with_as_many_waits(job: Job, waits: int) -> None:
    logits = torch.randn(16, 300, generator=torch.Generator().manual_seed(0))
    logits[:, [7, 70, 170, 250, 280, 290]] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 5.0])
    costs = [cost_of_answers(job, logits[:count]) for count in (1, 2, 16)]
    assert [cost.waits for cost in costs] == [waits] * 3
    assert len({cost.launches for cost in costs}) == 1
