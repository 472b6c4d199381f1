"""Slabs that are coded without loss: every byte comes back, and none takes more than before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.compression import lossless
from flexgen_helm.compression.lossless_slab import encode_slab
from flexgen_helm.errors import CorruptFile
from flexgen_helm.memory.amounts import PAGE
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.slab import SlabLayout, SlabTensor

DTYPES = [torch.bfloat16, torch.float16]


def bound_slab(tensor: Tensor) -> tuple[Tensor, SlabLayout]:
    """A slab with one tensor."""
    layout = SlabLayout(
        (place := SlabTensor(("weight",), tensor.dtype, tuple(tensor.shape), 0),), -(-tensor.nbytes // PAGE) * PAGE
    )
    memory = allocate(layout.num_bytes)
    place.view(memory).copy_(tensor)
    return memory, layout


@given(
    st.sampled_from([*DTYPES, torch.float32, torch.int64, torch.bool]),
    st.sampled_from(DTYPES),
    st.sampled_from(["random", "normal", "zero"]),
    st.integers(1, 30_000),
    st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_every_byte_of_any_tensor_comes_back(
    dtype: torch.dtype, coded: torch.dtype, content: str, count: int, threads: int
) -> None:
    generator = np.random.default_rng(count)
    if content == "normal":
        tensor = torch.from_numpy(generator.normal(0, 0.02, count)).to(dtype)
    else:
        size = count * dtype.itemsize
        number = (
            generator.integers(0, 2 if dtype == torch.bool else 256, size, np.uint8)
            if content == "random"
            else np.zeros(size, np.uint8)
        )
        tensor = torch.from_numpy(number).view(dtype)
    memory, layout = bound_slab(tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lossless, "FRAME_NUMBERS", 1000)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        stored, form = encode_slab(memory, layout, coded)
        assert form.stored.num_bytes <= layout.num_bytes
        assert (form.bound, form.carried, form.is_coded, form.is_packed) == (layout, layout, True, False)
        for fill in (form.decode, form.load):
            found = torch.full((layout.num_bytes + 5,), 3, dtype=torch.uint8)
            fill(stored, found)
            assert torch.equal(found[: layout.num_bytes], memory)
            assert bool((found[layout.num_bytes :] == 3).all())


def test_what_does_not_shrink_is_stored_as_it_is() -> None:
    noise = torch.randint(0, 256, (50_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    memory, layout = bound_slab(noise)
    stored, form = encode_slab(memory, layout, torch.bfloat16)
    assert form.stored.num_bytes == layout.num_bytes
    assert stored.data_ptr() == memory.data_ptr()


def test_gaussian_weights_shrink_by_a_third() -> None:
    """Their exponents have 2.55 bits of entropy (`test_lossless`), so that 16 bits become about 10.6."""
    weight = (torch.randn(2**19, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    memory, layout = bound_slab(weight)
    _, form = encode_slab(memory, layout, torch.bfloat16)
    assert 1.45 < layout.num_bytes / form.stored.num_bytes < 16 / 10.55


def test_damage_is_noticed_in_every_thread() -> None:
    weight = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    memory, layout = bound_slab(weight)
    stored, form = encode_slab(memory, layout, torch.bfloat16)
    stored[form.stored.tensors[0].num_bytes - 100] ^= 4
    with pytest.raises(CorruptFile, match="damaged"):
        form.decode(stored, torch.empty_like(memory))
