"""The judge of compressed K/V: without compression it is the model, and where the outcome is known by hand it gives that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flexgen_helm.compression.config import CompressionConfig, parse
from tests.attention.compressed_reference import CHUNK, PAGE, Call, attend, flexgen, reference_attention, sealed
from tests.models import save_tiny

EXACT = CompressionConfig()
CAUSAL = torch.ones(300, 300, dtype=torch.bool).tril()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_without_compression_it_is_the_model(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path), dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(3, 300, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids).logits
        with reference_attention(model.eval(), EXACT):
            found = model(ids).logits
        with reference_attention(model, parse("kv2")):
            other = model(ids).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    # A window of 8 reaches an earlier chunk from the first tokens of the next.
    torch.testing.assert_close(other[:, :CHUNK], expected[:, :CHUNK], atol=2e-4, rtol=0)
    assert (other - expected)[:, CHUNK:].abs().max() > 1e-3


def random_qkv(heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(heads)
    q, k, v = (torch.randn(n, 300, 8, generator=chance) for n in (heads, heads // 2, heads // 2))
    return q, k, v


def test_sparsity_takes_nothing_from_pages_of_equal_values() -> None:
    q, k, _ = random_qkv()
    v = torch.arange(320.0).view(2, 10, 16)[:, :, :1].repeat_interleave(PAGE, 1)[:, :300].expand(-1, -1, 8)
    call = Call(CAUSAL, 1.0, sinks=torch.zeros(4))
    torch.testing.assert_close(attend(parse("s5"), q, k, v, call), attend(EXACT, q, k, v, call))


def test_equal_weights_are_taken_by_position_and_the_rest_by_means_of_pages() -> None:
    _, k, v = random_qkv()
    found = attend(parse("s10"), torch.zeros(4, 300, 8), k, v, Call(CAUSAL, 1.0))
    t = 290  # 256 earlier keys, of which 26 are read; 35 keys of its own chunk
    means = v[:, :256].view(2, 8, PAGE, 8).mean(2)
    total = v[:, :26].sum(1) + 6 * means[:, 0] + 32 * means[:, 1:].sum(1) + v[:, 256 : t + 1].sum(1)
    torch.testing.assert_close(found[::2, t], total / (t + 1))
    torch.testing.assert_close(found[1::2, t], total / (t + 1))


def test_flexgen_takes_equal_weights_by_position_and_drops_the_rest() -> None:
    _, k, v = random_qkv()
    found = attend(parse("s10-flexgen"), torch.zeros(4, 300, 8), k, v, Call(CAUSAL, 1.0))
    torch.testing.assert_close(found[0, 290], (v[0, :29].sum(0) + v[0, 290]) / 291)


def test_keys_outside_of_a_mask_are_neither_read_nor_counted() -> None:
    _, k, v = random_qkv()
    window = CAUSAL & ~CAUSAL.tril(-100)
    found = attend(parse("s50"), torch.zeros(4, 300, 8), k, v, Call(window, 1.0))
    t = 290  # keys 191 to 255 are earlier ones: 65, of which 33 are read
    means = v[:, :256].view(2, 8, PAGE, 8).mean(2)
    total = v[0, 191:224].sum(0) + 32 * means[0, 7] + v[0, 256 : t + 1].sum(0)
    torch.testing.assert_close(found[0, t], total / 100)


@pytest.mark.parametrize("name", ["k4", "v4", "k4v8"])
def test_numbers_on_the_grid_of_their_range_lose_nothing(name: str) -> None:
    q, _, _ = random_qkv()
    config = parse(name)
    k = torch.arange(300).remainder(2**config.k_bits if config.k_bits < 16 else 7)[None, :, None].expand(2, -1, 8) / 4
    # Every token has the least and the largest code.
    v = torch.tensor([0, 1, 2, 3, 5, 7, 11, 2**config.v_bits - 1 if config.v_bits < 16 else 15]) / 2
    call = Call(CAUSAL, 0.1)
    values = v.expand(2, 300, 8)
    torch.testing.assert_close(attend(config, q, k, values, call), attend(EXACT, q, k, values, call))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_error_is_at_most_half_a_step(bits: int) -> None:
    x = torch.randn(100, PAGE, generator=torch.Generator().manual_seed(bits)) + 3
    low, high = x.amin(-1).double(), x.amax(-1).double()
    # A bfloat16 is at most 1/128 of its size from the next. Zero is rounded down, the step up.
    step = (high - low + low.abs() / 128) / (2**bits - 1) * (1 + 1 / 128)
    assert bool(((sealed(x, bits) - x).abs().amax(-1) <= step / 2 + 1e-6).all())
    # A float16 is rounded by at most 1/2048 of its size.
    step = (high - low) / (2**bits - 1)
    assert bool(((flexgen(x, bits) - x).abs().amax(-1) <= step / 2 + (high - low + low.abs()) / 2048 + 1e-6).all())


@pytest.mark.parametrize("quantise", [sealed, flexgen])
def test_a_constant_is_as_exact_as_its_rounded_minimum(quantise: Callable[[Tensor, int], Tensor]) -> None:
    constant = torch.full((1, PAGE), 0.3)
    torch.testing.assert_close(quantise(constant, 4), constant, atol=0.3 / 128, rtol=0)
