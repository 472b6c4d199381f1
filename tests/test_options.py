"""Policies and amounts of memory as they are typed."""

from __future__ import annotations

import pytest

from flexgen_helm.errors import PolicyError
from flexgen_helm.options import parse_max_memory, parse_policy
from flexgen_helm.types import Policy


@pytest.mark.parametrize(
    "text",
    [
        "gpu_batch_size=64, weights=0.2:0.8:0 ,cpu_attention=0.5,overlap=false,block_tokens=null",
        '{"gpu_batch_size": 64, "weights": [0.2, 0.8, 0], "cpu_attention": 0.5, "overlap": false, "block_tokens": null}',
    ],
)
def test_both_forms_of_a_policy(text: str) -> None:
    assert parse_policy(text) == Policy(gpu_batch_size=64, weights=(0.2, 0.8, 0.0), cpu_attention=0.5, overlap=False)


@pytest.mark.parametrize("text", ["slab_coding=lossless, prefetch=2", '{"slab_coding": "lossless", "prefetch": 2}'])
def test_words_of_a_policy_need_no_quotes(text: str) -> None:
    assert parse_policy(text) == Policy(slab_coding="lossless", prefetch=2)


def test_a_coding_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(PolicyError, match="slab_coding must be one of auto, plain, lossless, not 'zip'"):
        parse_policy('{"slab_coding": "zip"}')


@pytest.mark.parametrize("text", ["", "64", "weights", "weights=0.2:x:0", "gpu_batch_size=6=4", '{"weights": ', "overlap=no"])
def test_what_is_no_policy_is_shown_how_to_write_one(text: str) -> None:
    with pytest.raises(PolicyError, match=r"weights=0\.2:0\.8:0"):
        parse_policy(text)


def test_a_field_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(PolicyError, match=r"'weight'.*gpu_batch_size, .*weights"):
        parse_policy("weight=1:0:0")


def test_amounts_of_memory() -> None:
    assert parse_max_memory("device=15GiB, host=100GB") == {"device": "15GiB", "host": "100GB"}
    with pytest.raises(PolicyError, match="device=15GiB,host=100GiB"):
        parse_max_memory("15GiB")
