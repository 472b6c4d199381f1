"""Configurations by name have the numbers of parameters that are published for them."""

from __future__ import annotations

import pytest
import torch

from flexgen_helm.loading.assembly import empty_model
from flexgen_helm.loading.named_configs import CONFIGS, named_config

PUBLISHED = {
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-6.7b": 6_658_473_984,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
}
"""By the headers of the checkpoints on the hub."""
BILLIONS = {
    "facebook/opt-2.7b": 2.7,
    "facebook/opt-13b": 13,
    "facebook/opt-30b": 30,
    "facebook/opt-66b": 66,
    "facebook/opt-175b": 175,
}
"""By their names."""


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters(name: str) -> None:
    config = named_config(name)
    assert config is not None
    assert config.dtype in (torch.float16, torch.bfloat16)
    model = empty_model(name, config, torch.bfloat16)
    tied = model.all_tied_weights_keys
    count = sum(parameter.numel() for key, parameter in model.named_parameters() if key not in tied)
    if name in PUBLISHED:
        assert count == PUBLISHED[name]
    else:
        assert count / 1e9 == pytest.approx(BILLIONS[name], rel=0.02)


def test_names_are_found_without_their_owner() -> None:
    assert named_config("OPT-30B") == named_config("facebook/opt-30b")
    assert named_config("opt-31b") is None
