"""Final hidden states and the output head apart: what they give together is what a run gives, bit by bit."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.errors import FlexGenError, InvalidJob
from flexgen_helm.memory.device import CPU, Device
from tests.jobs import random_tokens
from tests.workbench import NARROW, OWN_MEMORY, POLICY, Workbench

PREFIX = random_tokens(3, 20)
SEQUENCES = [PREFIX + random_tokens(seed, 9 + seed) for seed in range(5)] + [random_tokens(9, 2), PREFIX, PREFIX]
"""Shared prefixes, one sequence that is a prefix of others, two equal ones."""


def apart(engine: Engine, sequences: list[list[int]], size: int = 7) -> list[list[float]]:
    """Log-probabilities of all tokens but the first, from logits that are taken `size` positions at a time."""
    hidden = engine.final_hidden(sequences)
    with engine.head() as head:
        logits = [torch.cat([head(piece) for piece in states.split(size)]) for states in hidden]
    return [logprobs(each, tokens) for each, tokens in zip(logits, sequences, strict=True)]


def logprobs(logits: Tensor, tokens: list[int]) -> list[float]:
    return [float(row[token]) for row, token in zip(torch.log_softmax(logits, -1), tokens[1:], strict=True)]


def together(engine: Engine, sequences: list[list[int]]) -> list[list[float]]:
    results = engine.run([Job(token_ids=tokens, score_prompt=True) for tokens in sequences])
    return [(result.prompt_logprobs or [])[1:] for result in results]


@pytest.mark.parametrize("policy", [POLICY, NARROW])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "lfm2", "deepseek_v4"])
def test_the_head_gives_a_runs_own_logits(bench: Workbench, family: str, policy: Policy) -> None:
    engine = bench.engine(family, policy=policy)
    assert apart(engine, SEQUENCES) == together(engine, SEQUENCES)


@pytest.mark.parametrize("device", [CPU, OWN_MEMORY])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("weights", [(0, 1, 0), (0, 0, 1), (0.3, 0.3, 0.4)])
def test_weights_may_be_anywhere(
    bench: Workbench, tmp_path: Path, weights: tuple[float, float, float], overlap: bool, device: Device
) -> None:
    policy = Policy(16, 1, gpu_batch_tokens=32, block_tokens=96, weights=weights, hidden=(0, 0, 1), overlap=overlap)
    expected = together(bench.engine("llama"), SEQUENCES)
    with Engine.from_pretrained(
        str(bench.folder("llama")), device=device, policy=policy, offload_folder=tmp_path / "slabs"
    ) as engine:
        for _ in range(2):
            assert apart(engine, SEQUENCES) == expected
            assert together(engine, SEQUENCES) == expected


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=6), size=st.integers(1, 40))
def test_any_lengths_and_slices(bench: Workbench, lengths: list[int], size: int) -> None:
    engine = bench.engine("llama", policy=NARROW)
    sequences = [random_tokens(seed, length) for seed, length in enumerate(lengths)]
    assert [len(states) for states in engine.final_hidden(sequences)] == [length - 1 for length in lengths]
    assert apart(engine, sequences, size) == together(engine, sequences)


def test_jobs_wait_while_the_head_is_held(bench: Workbench) -> None:
    engine = bench.engine("llama")
    (hidden,) = engine.final_hidden([PREFIX])
    with engine.head() as head:
        future = engine.submit(Job(token_ids=PREFIX, max_new_tokens=1))
        logits = head(hidden)
        with pytest.raises(TimeoutError):
            future.result(timeout=0.5)
    assert len(future.result().completions[0].token_ids) == 1
    assert torch.equal(logits, engine_logits(engine, hidden))


def engine_logits(engine: Engine, hidden: Tensor) -> Tensor:
    with engine.head() as head:
        return head(hidden)


def test_several_threads_take_turns(bench: Workbench) -> None:
    engine = bench.engine("llama")
    found: list[list[list[float]]] = []
    threads = [threading.Thread(target=lambda: found.append(apart(engine, SEQUENCES))) for _ in range(3)]
    for thread in threads:
        thread.start()
    expected = together(engine, SEQUENCES)
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def test_an_error_leaves_the_engine_usable(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = bench.engine("llama")
    expected = together(engine, SEQUENCES)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flexgen_helm.execution.sweep_run.SweepRun.compute", fail)
        with pytest.raises(KeyboardInterrupt):
            engine.final_hidden(SEQUENCES)
    assert apart(engine, SEQUENCES) == expected == together(engine, SEQUENCES)


def test_what_cannot_be_computed_is_refused(bench: Workbench) -> None:
    engine = bench.engine("llama")
    for tokens, reason in (([5], "1 tokens, of which none is predicted"), ([5, 10**6], "token id 1000000")):
        with pytest.raises(InvalidJob, match=reason):
            engine.final_hidden([tokens])


def test_a_closed_engine_says_so(bench: Workbench) -> None:
    engine = Engine.from_pretrained(str(bench.folder("llama")), device="cpu", policy=POLICY)
    engine.close()
    with pytest.raises(FlexGenError, match="closed"):
        engine.final_hidden([PREFIX])
