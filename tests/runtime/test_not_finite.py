"""A job whose numbers are not finite has an error of its own, and nobody else's answer moves by a bit."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexgen_helm import Engine, Job, Policy, Result, UnsupportedModel
from flexgen_helm.errors import NotFinite
from flexgen_helm.rows.choice import KindChoice
from tests.jobs import fixed_mix, random_tokens
from tests.workbench import NARROW, OWN_MEMORY, POLICY, Workbench

WILD = 1
"""A token whose activations overflow in float16; no other job has it, nor has the self-check."""
HEALTHY = fixed_mix(71, 9) + [
    Job(token_ids=random_tokens(seed, 9), max_new_tokens=5, temperature=1.0, num_completions=2, seed=seed) for seed in range(2)
]
FLOAT16 = "overflows in float16: use bfloat16 or float32"
TIERS = replace(POLICY, cache=(0.3, 0.3, 0.4), hidden=(0.4, 0.3, 0.3))
KINDS: list[tuple[str, KindChoice, Policy]] = [
    ("llama", "packed", POLICY),
    ("llama", "packed", NARROW),
    ("llama", "packed", TIERS),
    ("mixtral", "packed", POLICY),
    ("llama", "single", POLICY),
]


def changed(bench: Workbench, family: str, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a tiny model with other weights."""
    shutil.copytree(bench.folder(family), folder)
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})
    return folder


def with_wild_token(weights: dict[str, Tensor]) -> None:
    weights["model.embed_tokens.weight"][WILD] *= 1e6


def with_wild(jobs: list[Job]) -> list[Job]:
    """Jobs of which each has the token somewhere: behind the others' prefixes, before their endings, alone."""
    chance = random.Random(3)
    found = []
    for job in jobs:
        tokens = list(job.token_ids or ())
        place = chance.randrange(len(tokens) + 1)
        found.append(replace(job, token_ids=(*tokens[:place], WILD, *tokens[place:])))
    return found


@contextmanager
def opened(folder: Path, rows: KindChoice, policy: Policy, tmp_path: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(
        str(folder),
        dtype="float16",
        device=OWN_MEMORY if policy is TIERS else "cpu",
        policy=policy,
        rows=rows,
        offload_folder=tmp_path,
    ) as engine:
        yield engine


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}-{KINDS.index(kind)}")
def healthy(
    request: pytest.FixtureRequest, bench: Workbench, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Callable[[], Any], list[Result]]:
    """How to open an engine, and its answers to healthy jobs alone."""
    family, rows, policy = request.param
    root = tmp_path_factory.mktemp("wild")
    folder = changed(bench, family, root / "model", with_wild_token)
    with opened(folder, rows, policy, root) as engine:
        alone = engine.run(HEALTHY)
    return lambda: opened(folder, rows, policy, root), alone


def assert_refused(results: list[Result]) -> None:
    for result in results:
        assert isinstance(result.error, NotFinite)
        assert FLOAT16 in str(result.error)
        assert (result.completions, result.prompt_logprobs) == ([], None)


def test_neighbours_and_later_jobs_keep_their_bits(healthy: tuple[Callable[[], Any], list[Result]]) -> None:
    make, alone = healthy
    wild = with_wild(HEALTHY)
    mixed = [job for pair in zip(wild, HEALTHY, strict=True) for job in pair]
    with make() as engine:
        results = engine.run(mixed, on_error="return")
        assert results[1::2] == alone
        assert_refused(results[::2])
        assert_refused(engine.run(wild, on_error="return"))
        assert engine.run(HEALTHY) == alone
        with pytest.raises(NotFinite, match=f"^job 3: .*{FLOAT16}"):
            engine.run([*HEALTHY[:3], wild[0], HEALTHY[4]])
        with pytest.raises(NotFinite, match=FLOAT16):
            engine.submit(wild[0]).result(timeout=60)
        assert engine.run(HEALTHY) == alone


@pytest.mark.parametrize("rows", ["packed", "single"])
def test_a_shared_prefix_condemns_all_who_have_it_and_nobody_else(bench: Workbench, tmp_path: Path, rows: KindChoice) -> None:
    """In the page in which they part: some go on behind the token, some end before it."""
    folder = changed(bench, "llama", tmp_path / "model", with_wild_token)
    start, ends = random_tokens(1, 40), [random_tokens(seed, 5) for seed in range(2, 8)]
    asked = [{"max_new_tokens": 0, "score_prompt": True}, {"max_new_tokens": 4}, {"max_new_tokens": 1, "score_prompt": True}]
    jobs = [
        Job(token_ids=(*start, *middle, *end), **fields)  # type: ignore[arg-type]
        for middle in ([], [WILD])
        for number, end in enumerate(ends)
        for fields in asked[number % 3 :]
    ]
    half = len(jobs) // 2
    with opened(folder, rows, POLICY, tmp_path) as engine:
        alone = engine.run(jobs[:half])
        results = engine.run(jobs, on_error="return")
    assert results[:half] == alone
    assert_refused(results[half:])


@pytest.mark.parametrize("rows", ["packed", "single"])
def test_a_completion_that_overflows_in_the_middle(bench: Workbench, tmp_path: Path, rows: KindChoice) -> None:
    """The model generates the token: its row of the output head is that of what is generated third otherwise."""
    job = replace(HEALTHY[0], token_ids=tuple(random_tokens(5, 9)), max_new_tokens=8, score_prompt=False)
    with Engine.from_pretrained(str(bench.folder("llama")), dtype="float16", device="cpu", policy=POLICY, rows=rows) as engine:
        tokens = engine.run([replace(job, ignore_eos=True)])[0].completions[0].token_ids
    third = tokens[2]
    assert third not in (*tokens[:2], WILD)

    def swap(weights: dict[str, Tensor]) -> None:
        with_wild_token(weights)
        weights["lm_head.weight"][[WILD, third]] = weights["lm_head.weight"][[third, WILD]]

    folder = changed(bench, "llama", tmp_path / "model", swap)
    short, others = replace(job, max_new_tokens=3), HEALTHY[4:9]
    with opened(folder, rows, POLICY, tmp_path) as engine:
        alone = engine.run(others, on_error="return")
        assert any(result.error is None for result in alone)
        ends, goes_on, *rest = engine.run([short, job, *others], on_error="return")
    assert ends.completions[0].token_ids == [*tokens[:2], WILD]
    assert_refused([goes_on])
    assert [result.completions for result in rest] == [result.completions for result in alone]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_said_in_other_dtypes(bench: Workbench, tmp_path: Path, dtype: str) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        weights["model.embed_tokens.weight"][WILD, 5] = torch.nan

    folder = changed(bench, "llama", tmp_path / "model", damage)
    with Engine.from_pretrained(str(folder), dtype=dtype, device="cpu", policy=POLICY) as engine:
        good, bad = HEALTHY[0], with_wild(HEALTHY[:1])[0]
        alone = engine.run([good])[0]
        results = engine.run([bad, good], on_error="return")
    assert results[1] == alone
    assert isinstance(results[0].error, NotFinite)
    assert f"NaN or infinity in {dtype}" in str(results[0].error)
    assert "float16:" not in str(results[0].error)


def test_k_and_v_kept_in_float16_that_overflow_there(bench: Workbench, tmp_path: Path) -> None:
    def widen(weights: dict[str, Tensor]) -> None:
        weights["model.layers.1.self_attn.v_proj.weight"] *= 2.0**20
        weights["model.layers.1.self_attn.o_proj.weight"] *= 2.0**-20

    folder = changed(bench, "llama", tmp_path / "model", widen)
    for kv_dtype, fails in (("float16", True), ("bfloat16", False)):
        with Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY, kv_dtype=kv_dtype) as engine:
            (result,) = engine.run(HEALTHY[:1], on_error="return")
        assert (result.error is not None) == fails
        assert not fails or "in which K and V are kept: use bfloat16 or float32 (kv_dtype)" in str(result.error)


@pytest.mark.parametrize("rows", ["auto", "packed", "single"])
def test_a_model_that_overflows_in_float16_is_refused_at_load(bench: Workbench, tmp_path: Path, rows: KindChoice) -> None:
    def widen(weights: dict[str, Tensor]) -> None:
        weights["model.embed_tokens.weight"] *= 1e6

    folder = changed(bench, "llama", tmp_path / "model", widen)
    with pytest.raises(UnsupportedModel, match=FLOAT16) as found:
        Engine.from_pretrained(str(folder), dtype="float16", device="cpu", policy=POLICY, rows=rows)
    assert "computed wrongly" not in str(found.value)


def test_weights_that_are_not_finite_are_named_at_load(bench: Workbench, tmp_path: Path) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        weights["model.norm.weight"][0] = torch.nan

    folder = changed(bench, "llama", tmp_path / "model", damage)
    with pytest.raises(UnsupportedModel, match=r"NaN or infinity in float32.*weights are damaged"):
        Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY)


@pytest.mark.parametrize("rows", ["packed", "single"])
def test_tokens_that_the_model_suppresses(bench: Workbench, monkeypatch: pytest.MonkeyPatch, rows: KindChoice) -> None:
    """Logits of -inf, from the first forward on, as some models mask a part of their vocabulary."""
    suppressed = list(range(200, 320))
    call = torch.nn.Linear.__call__

    def masked(self: torch.nn.Linear, hidden: Tensor) -> Tensor:
        logits: Tensor = call(self, hidden)
        return logits.index_fill(-1, torch.tensor(suppressed), -torch.inf) if self.out_features == 320 else logits

    monkeypatch.setattr(torch.nn.Linear, "__call__", masked)
    with Engine.from_pretrained(str(bench.folder("llama")), dtype="float32", device="cpu", policy=POLICY, rows=rows) as engine:
        scored = Job(token_ids=(250, 7, 8, 9), max_new_tokens=0, score_prompt=True)
        generated = Job(token_ids=(7, 250, 9), max_new_tokens=4, top_logprobs=210)
        impossible = replace(scored, token_ids=(7, 8, 250, 9))
        first, second, third = engine.run([scored, generated, impossible], on_error="return")
    assert first.error is None
    assert first.prompt_logprobs is not None
    assert min(first.prompt_logprobs) > -torch.inf
    steps = second.completions[0].top_logprobs
    assert [len(step) for step in steps] == [200] * 4
    assert all(candidate.token_id < 200 and candidate.logprob > -torch.inf for step in steps for candidate in step)
    assert isinstance(third.error, NotFinite)
    assert "Token 250 at position 2 of the prompt has probability 0" in str(third.error)
