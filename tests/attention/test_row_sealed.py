"""Attention over sealed pages against the plain rule in `tests.attention.compressed_reference`, which shares no code."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.compression.config import CompressionConfig
from flexgen_helm.kv_cache.cache_format import CacheFormat
from tests.attention.compressed_reference import Call, attend
from tests.attention.test_row import HEADS, OPTIONS, RULES, Heads, Machine, Options, random_rows

BITS = st.sampled_from([2, 4, 8, 16])
FORMATS = st.builds(CacheFormat, BITS, BITS, st.sampled_from([None, 1, 10, 60, 99]), st.booleans()).filter(
    lambda cache_format: not cache_format.is_plain
)


def expected(machine: Machine, cache_format: CacheFormat) -> list[Tensor]:
    """What the rule gives for each sequence, ``[T, heads, dim]``."""
    options, found = machine.options, []
    for q, k, v in machine.inputs:
        at = torch.arange(len(q))
        call = Call(
            RULES[options.rule].allowed(at[:, None], at[None]), 1 / math.sqrt(q.shape[-1]), options.softcap, machine.sinks
        )
        config = CompressionConfig(**asdict(cache_format))
        output = attend(config, q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), call)
        found.append(output.transpose(0, 1))
    return found


@settings(max_examples=15)
@given(
    HEADS,
    OPTIONS,
    st.lists(st.integers(1, 600), min_size=1, max_size=4),
    st.sampled_from([0, 40, 300]),
    st.integers(0, 9),
    st.booleans(),
    FORMATS,
)
def test_rows_equal_the_rule(
    heads: Heads, options: Options, lengths: list[int], prefix: int, seed: int, in_calls: bool, cache_format: CacheFormat
) -> None:
    machine = Machine(heads, options, lengths, prefix, cache_format)
    if in_calls or cache_format.flexgen:
        machine.decode = None
    for row in random_rows(lengths, prefix, seed):
        machine.run(*row)
    begins = [0] + [machine.shared * 32] * (len(lengths) - 1)
    for output, wanted, begin in zip(machine.outputs, expected(machine, cache_format), begins, strict=True):
        assert (output - wanted)[begin:].abs().max() < 1e-5


@pytest.mark.parametrize(
    "cache_format", [CacheFormat(4, 4), CacheFormat(4, 4, 10), CacheFormat(4, 4, 10, flexgen=True)], ids=str
)
@pytest.mark.parametrize("in_calls", [False, True])
def test_decode_beside_others_has_the_bits_of_decode_alone(in_calls: bool, cache_format: CacheFormat) -> None:
    lengths = [300, 290, 270]
    outputs = []
    for chosen in ([0], [1], [2], [0, 1, 2]):
        machine = Machine(Heads(6, 3, 64, 64), Options(), lengths, 200, cache_format)
        if in_calls or cache_format.flexgen:
            machine.decode = None
        for k, m in enumerate(lengths):
            for a in range(0 if k == 0 else 192, m - 1, 64):
                machine.run("prefill", 64, [(k, a, min(m - 1, a + 64))])
        machine.run("decode", 16, [(i, lengths[i] - 1, lengths[i]) for i in chosen])
        outputs.append([machine.outputs[i][-1] for i in chosen])
    assert all(torch.equal(alone[0], together) for alone, together in zip(outputs[:3], outputs[3], strict=True))
