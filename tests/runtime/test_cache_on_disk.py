"""K and V on disk, exact pages and sealed ones: what goes wrong is a clear error, and the next run is as if it had not been."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.errors import CorruptFile, DiskFull, OutOfSpace
from flexgen_helm.kv_cache.page_stores import DiskPages
from flexgen_helm.kv_cache.pages import Form
from flexgen_helm.schedule.packed import PackedScheduler
from flexgen_helm.schedule.rows import Sweep
from tests.jobs import random_tokens
from tests.workbench import Workbench

ON_DISK = Policy(gpu_batch_size=16, gpu_batch_tokens=32, block_tokens=96, cache=(0, 0, 1))
JOBS = [Job(token_ids=random_tokens(i, 140 + 25 * i), max_new_tokens=6, score_prompt=i == 0) for i in range(3)]
"""Prompts that several sweeps compute and that end behind a chunk of 128 tokens."""
FORMS: dict[str | None, tuple[Form, ...]] = {None: ("exact",), "kv4-flexgen": ("exact",)}
"""Forms of pages by variant; others have both."""


def load(folder: Path, variant: str | None, offload: Path, policy: Policy = ON_DISK, disk: str | None = None) -> Engine:
    limits = {} if disk is None else {"disk": disk}
    return Engine.from_pretrained(
        str(folder), compression=variant, device="cpu", policy=policy, offload_folder=offload, max_memory=limits
    )


def descriptor(engine: Engine, form: Form) -> int:
    """The open file with the pages of a form."""
    store = engine._parts.executor._rows._cache._forms[form].working._stores["disk"]  # type: ignore[attr-defined]
    assert isinstance(store, DiskPages)
    return store._file.descriptor


@contextmanager
def full(file: int) -> Iterator[None]:
    """Nothing can be written into an open file, as on a full disk."""
    device, kept = os.open("/dev/full", os.O_RDWR), os.dup(file)
    os.dup2(device, file)
    try:
        yield
    finally:
        os.dup2(kept, file)
        os.close(device)
        os.close(kept)


@pytest.mark.parametrize(
    "variant", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("kv4", "s10")), "kv4s10", "kv4-flexgen"]
)
def test_full_disks_and_torn_files(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str | None
) -> None:
    planned = PackedScheduler.next_sweep
    with load(bench.folder("llama"), variant, tmp_path) as engine:
        expected = engine.run(JOBS)
        for form in FORMS.get(variant, ("exact", "sealed")):
            file = descriptor(engine, form)

            def torn(scheduler: PackedScheduler, file: int = file) -> Sweep:
                sweep = planned(scheduler)
                if sweep.num_decode_tokens:
                    os.ftruncate(file, 0)
                return sweep

            with full(file), pytest.raises(DiskFull, match=rf"{tmp_path} cannot be written: No space left.*Free some space"):
                engine.run(JOBS)
            with monkeypatch.context() as patch:
                patch.setattr(PackedScheduler, "next_sweep", torn)
                with pytest.raises(CorruptFile, match=rf"{tmp_path} is torn: it ends after \d+ bytes"):
                    engine.run(JOBS)
            assert engine.run(JOBS) == expected


@pytest.fixture
def long_llama(tmp_path: Path) -> Path:
    """A model that reads prompts of thousands of tokens, with 4 KiB of K and V for each."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=320, max_position_embeddings=4096, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_job_that_fits_only_compressed_is_served(long_llama: Path, tmp_path: Path) -> None:
    """1,020 tokens would need 4 MiB; the disk has 3.5 MiB. Prompts that part from the first leave less."""
    stem = random_tokens(1, 1000)
    jobs = [Job(token_ids=stem, max_new_tokens=20, score_prompt=True, ignore_eos=True)]
    jobs += [Job(token_ids=[*stem[:cut], 5], max_new_tokens=5, ignore_eos=True) for cut in (200, 500, 780)]
    with load(long_llama, "kv4", tmp_path / "plenty", replace(ON_DISK, cache=(1, 0, 0), block_tokens=512)) as engine:
        expected = engine.run(jobs)
    with load(long_llama, "kv4", tmp_path / "little", disk="3600KiB") as engine:
        assert engine.run(jobs[:1]) == expected[:1]
        assert engine.run(jobs) == expected
        with pytest.raises(OutOfSpace, match=r"The K/V cache of the job needs 3\.7 MiB, but there are 2\.8 MiB for all jobs"):
            engine.run([Job(token_ids=random_tokens(2, 3000), max_new_tokens=20)])
    plain = load(long_llama, None, tmp_path / "plain", disk="3600KiB")
    with plain as engine, pytest.raises(OutOfSpace, match=r"The K/V cache of the job needs 4\.2 MiB, but there are 3\.2 MiB"):
        engine.run(jobs[:1])
