"""Placement never changes row sizes: equal numerics and equal bits from Python, from YAML and from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from flexgen_helm import Engine, Policy, Result
from flexgen_helm.cli import main
from flexgen_helm.errors import PolicyError
from flexgen_helm.helm.deployment import parse_arguments
from flexgen_helm.helm.registry import load_engine
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.types import Numerics, ResolvedPolicy
from tests.jobs import fixed_mix
from tests.models import save_tiny

Answers = tuple[Numerics, list[Result]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("model")))


def answers(engine: Engine) -> Answers:
    with engine:
        return engine.numerics, engine.run(fixed_mix(21, 12))


def from_python(folder: str, placement: dict[str, Any], tmp_path: Path, **_: Any) -> Answers:
    policy = Policy(**placement) if placement else None
    return answers(Engine.from_pretrained(folder, device="cpu", policy=policy, offload_folder=tmp_path))


@pytest.fixture(scope="module")
def plain(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What an engine says that was told no placement."""
    return from_python(folder, {}, tmp_path_factory.mktemp("plain"))


def from_yaml(folder: str, placement: dict[str, Any], tmp_path: Path, *, few_requests: bool = False) -> Answers:
    named = {"policy": {name: list(shares) for name, shares in placement.items()}} if placement else {}
    arguments = {"name_or_path": folder, "device": "cpu", "offload_folder": str(tmp_path), **named}
    return answers(load_engine(parse_arguments(arguments), few_requests=few_requests))


def from_command_line(folder: str, placement: dict[str, Any], tmp_path: Path, *, few_requests: bool = False) -> Answers:
    found: list[Answers] = []
    original = Engine.from_pretrained

    def from_pretrained(*args: Any, **options: Any) -> Engine:
        found.append(answers(original(*args, **options)))
        raise PolicyError("seen enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "from_pretrained", from_pretrained)
        shares = ",".join(f"{name}={':'.join(map(str, value))}" for name, value in placement.items())
        options = ["--model", folder, "--device", "cpu", "--offload-folder", str(tmp_path)]
        options += ["--policy", shares] if placement else []
        assert main((["generate", "--prompt", "x"] if few_requests else ["bench"]) + options) == 2
    return found[0]


@pytest.mark.parametrize("route", [from_python, from_yaml, from_command_line])
@pytest.mark.parametrize("placement", [{"weights": (0, 1, 0)}, {"weights": (0, 0, 1), "hidden": (0, 1, 0)}])
def test_placement_alone_changes_no_numerics_and_no_bit(
    route: Callable[..., Answers], placement: dict[str, Any], folder: str, plain: Answers, tmp_path: Path
) -> None:
    assert route(folder, placement, tmp_path) == plain


@pytest.mark.parametrize("placement", [{}, {"weights": (0, 1, 0)}])
def test_a_few_requests_get_small_rows_whatever_the_placement(placement: dict[str, Any], folder: str, tmp_path: Path) -> None:
    client = from_yaml(folder, placement, tmp_path, few_requests=True)
    command = from_command_line(folder, placement, tmp_path, few_requests=True)
    assert client == command
    assert (client[0].rows.gpu_batch_size, client[0].rows.gpu_batch_tokens) == (16 * torch.get_num_threads(), 64)


@pytest.mark.parametrize(("few_requests", "sizes"), [(False, (64, 512)), (True, (16, 64))])
def test_sizes_that_are_named_stay_and_the_others_are_the_default(few_requests: bool, sizes: tuple[int, int]) -> None:
    assert torch.get_num_threads() == 1
    plain = resolved(None, CPU, few_requests=few_requests)
    assert (plain.gpu_batch_size, plain.gpu_batch_tokens) == sizes
    named = resolved(Policy(gpu_batch_tokens=48, prefetch=3), CPU, few_requests=few_requests)
    assert (named.gpu_batch_size, named.gpu_batch_tokens, named.prefetch) == (sizes[0], 48, 3)
    assert resolved(named, CPU) == named
    on_gpu = resolved(Policy(weights=(0, 1, 0)), Device(torch.device("cuda")), few_requests=few_requests)
    assert (on_gpu.gpu_batch_size, on_gpu.gpu_batch_tokens) == (256, 4096)


@pytest.mark.parametrize("fields", [{"gpu_batch_size": 0}, {"cache": (0, 1)}, {"weights": (1, 1, 0)}, {"prefetch": True}])
@pytest.mark.parametrize("kind", [Policy, ResolvedPolicy])
def test_a_policy_checks_itself_when_it_is_made(kind: type[Policy], fields: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=f"^{next(iter(fields))} must be"):
        kind(**{"gpu_batch_size": 16, "gpu_batch_tokens": 64, **fields})
