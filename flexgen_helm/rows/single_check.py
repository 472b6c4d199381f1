"""Self-check of single rows: prompts continued token by token are compared with transformers' forward of the whole text."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.execution.serial import SerialExecutor
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.rows import self_check
from flexgen_helm.rows.self_check import TOLERANCE, Cuts, FirstLayers, LayerCache, Tokens, Verdict
from flexgen_helm.rows.single import SingleRows, cache_bytes
from flexgen_helm.schedule.rows import Row, Segment, State, Sweep, pack_decode
from flexgen_helm.types import ResolvedPolicy

CUTS: Cuts = ((21, 16), (13, 8), (6, 1))
"""Sequences that continue longer than a short convolution, and a prompt of one token, which some models take for decoding."""
LONG_CUTS: Cuts = ((300, 295), (29, 24))
"""Sequences longer than the chunks in which state space models scan, for the first layers only."""


def check_single(model: RecordedModel, policy: ResolvedPolicy, *, max_length: int, first: FirstLayers | None = None) -> Verdict:
    """Compare prompts and their continuations, several in one sweep, with transformers' own forward.

    16-bit models are compared in fp32, on their first layers (`self_check.in_fp32`).

    Raises:
        UnsupportedModel: If they differ, or if the model's code fails in single rows.
    """
    with self_check.as_refusal():
        exact = self_check.in_fp32(model, first)
        worst = _difference(exact, policy, CUTS, max_length)
        with self_check.first_layers(exact) as few:
            worst = max(worst, _difference(few, policy, LONG_CUTS, max_length))
        sequences = self_check.random_sequences(model, CUTS, max_length)
        together = _in_single_rows(model, policy, sequences, CUTS)
        alone = [_in_single_rows(model, policy, [tokens], [cut])[0] for tokens, cut in zip(sequences, CUTS, strict=True)]
        self_check.require_numbers(alone)
        stable = all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
        return Verdict(worst, stable, _layer_caches(model, sequences[0], sequences[-1]))


def _difference(model: RecordedModel, policy: ResolvedPolicy, cuts: Cuts, max_length: int) -> float:
    sequences = self_check.random_sequences(model, cuts, max_length)
    got = _in_single_rows(model, policy, sequences, cuts)
    worst = self_check.worst_difference(self_check.plain_logprobs(model, sequences), got)
    if worst > TOLERANCE:
        raise UnsupportedModel(
            f"prompts continued token by token differ from transformers' own forward by {worst:.3g} in log-probability "
            f"(tolerance {TOLERANCE:g}): the model computes between its layers, or keeps state outside of its cache"
        )
    return worst


def _in_single_rows(model: RecordedModel, policy: ResolvedPolicy, sequences: list[Tokens], cuts: Cuts) -> list[Tensor]:
    """Return log-probabilities ``[compared, vocab]`` of each sequence, computed in single rows."""
    executor = SerialExecutor(SingleRows(model), head_slice=policy.gpu_batch_size)
    states = [State() for _ in sequences]
    ends = self_check.cut_points(sequences, cuts)
    prompts = [_segment(tokens, 0, end, state) for tokens, end, state in zip(sequences, ends, states, strict=True)]
    rows = [Row("prefill", len(prompt.tokens), [prompt]) for prompt in prompts]
    parts = [[logprobs] for logprobs in self_check.sweep_logprobs(executor, Sweep(rows))]
    for step in range(max(len(tokens) - end for tokens, end in zip(sequences, ends, strict=True))):
        live = [i for i, tokens in enumerate(sequences) if ends[i] + step < len(tokens)]
        segments = [_segment(sequences[i], ends[i] + step, ends[i] + step + 1, states[i]) for i in live]
        for i, logprobs in zip(live, self_check.sweep_logprobs(executor, Sweep(pack_decode(segments, policy))), strict=True):
            parts[i].append(logprobs)
    return [torch.cat(found) for found in parts]


def _segment(tokens: Tokens, start: int, end: int, state: State) -> Segment:
    return Segment(tokens[start:end], start, logit_requests=self_check.compared_requests(len(tokens), start, end), state=state)


def _layer_caches(model: RecordedModel, long: Tokens, short: Tokens) -> tuple[LayerCache, ...]:
    """Return the bytes that each layer keeps for each token and for each sequence, from a long and a short prompt."""
    found = []
    for most, least in zip(_kept_bytes(model, long), _kept_bytes(model, short), strict=True):
        per_token = max(0, -(-(most - least) // max(1, len(long) - len(short))))
        found.append(LayerCache((per_token,), max(0, least - len(short) * per_token)))
    return tuple(found)


def _kept_bytes(model: RecordedModel, tokens: Tokens) -> list[int]:
    """Return the bytes that each layer adds to the cache of a prompt."""
    rows, state = SingleRows(model), State()
    recording = rows.record(Row("prefill", len(tokens), [_segment(tokens, 0, len(tokens), state)]))
    sizes = [0]
    for j in range(rows.num_layers):
        rows.replay(j, recording)
        sizes.append(cache_bytes(state.content))
    return [after - before for before, after in itertools.pairwise(sizes)]
