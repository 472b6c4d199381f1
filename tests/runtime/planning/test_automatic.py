"""`policy: auto`: what is searched and when, what stays as it is, and that no answer changes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.compression.config import resolve
from flexgen_helm.errors import FlexGenError, InvalidJob, PolicyError
from flexgen_helm.loading.source import ModelSource, open_dummy
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.machine.profile_file import write_profile
from flexgen_helm.memory.amounts import MaxMemory, parse_max_memory
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.policy.planner.search.variants import with_packed_weights
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.policy.shapes_of_model import plain_formats, shapes_of
from flexgen_helm.runtime.engine_options import EngineOptions
from flexgen_helm.runtime.engine_plan import EnginePlan, plan_engine
from flexgen_helm.runtime.planning import automatic
from flexgen_helm.runtime.planning.automatic import automatic_policy, known_workload
from flexgen_helm.runtime.slab_places import SlabPlaces
from flexgen_helm.types import ON_DEVICE, WeightNumerics
from tests.dimensions import VOCAB_SIZE
from tests.jobs import fixed_mix, random_tokens
from tests.policy.planner.made import cpu, t4
from tests.policy.planner.triples import random_triple
from tests.workbench import OWN_MEMORY, Workbench

ROWS = Policy(auto=True, gpu_batch_size=16, gpu_batch_tokens=32)
GENERATION = Workload.uniform(12, 40, 8)
SCORING = Workload.uniform(12, 40, 0, score=True)
MACHINES: dict[bool, tuple[Device, MachineProfile]] = {False: (CPU, cpu()), True: (OWN_MEMORY, t4())}
TIGHT: dict[bool, MaxMemory] = {False: {"host": "14MiB"}, True: {"device": "14MiB", "host": "6MiB"}}
"""Less than the weights of the model below need, which are 12 MiB."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A model of 5 layers of 2.3 MiB; its weights are never made."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaConfig(num_hidden_layers=5, vocab_size=VOCAB_SIZE, **sizes).save_pretrained(folder)  # type: ignore[arg-type]
    return open_dummy(str(folder), dtype="float32", device=CPU.torch_device)


@pytest.fixture(scope="module")
def tight(source: ModelSource) -> dict[bool, EnginePlan]:
    """What is searched for generation in tight memory, without and with a memory of its own."""
    return {own: planned(source, GENERATION, own_memory=own, max_memory=TIGHT[own]) for own in (False, True)}


def planned(
    source: ModelSource,
    workload: Workload | None,
    *,
    own_memory: bool = False,
    max_memory: MaxMemory | None = None,
    variant: str = "",
    **options: Any,
) -> EnginePlan:
    """Plans an engine without loading anything."""
    device, profile = MACHINES[own_memory]
    _, compression = resolve(f"model{variant}")
    given = {"policy": ROWS, "profile": profile, "limits": parse_max_memory(max_memory), "compression": compression}
    made = EngineOptions(device, workload=workload, **{**given, **options})
    places = SlabPlaces(WeightNumerics(source.digest(), "float32"), None)
    return plan_engine(source, made, source.dtype, places, None)


@pytest.mark.parametrize("own_memory", [False, True])
def test_a_model_that_fits_stays_resident_and_nothing_is_measured(
    source: ModelSource, own_memory: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path))
    monkeypatch.setattr(automatic, "LEAST_MEASURED", 0)
    with caplog.at_level(logging.INFO):
        found = planned(source, GENERATION, own_memory=own_memory, profile=None)
    assert "all fit on the device" in caplog.text
    assert found.automatic is None
    assert found.memory.weights.shares == ON_DEVICE
    assert not (tmp_path / "profiles").exists()


def test_this_machine_is_not_measured_for_a_small_model(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path))
    with caplog.at_level(logging.INFO):
        found = planned(source, GENERATION, profile=None, max_memory=TIGHT[False])
    assert "not measured for so small a model" in caplog.text
    assert found.automatic is None
    assert not (tmp_path / "profiles").exists()


@pytest.mark.parametrize("own_memory", [False, True])
def test_a_model_that_does_not_fit_in_ram_is_on_disk(tight: dict[bool, EnginePlan], own_memory: bool) -> None:
    found = tight[own_memory]
    assert found.automatic is not None
    assert found.memory.weights.shares[2] > 0
    limits = parse_max_memory(TIGHT[own_memory])
    assert all(found.memory.peak_bytes[tier] <= count for tier, count in limits.items())


def test_blocks_for_scoring_are_larger_than_for_generation(source: ModelSource) -> None:
    """Scores need no cache, so that a sweep over the weights on disk may serve more prompts."""
    many = (Workload.uniform(128, 96, 0, score=True), Workload.uniform(64, 64, 32))
    scoring, generation = (planned(source, work, max_memory={"host": "16MiB"}).memory for work in many)
    blocks = [plan.block_tokens(plan.left(plan.space.available)) for plan in (scoring, generation)]
    assert blocks[0] > blocks[1]


@pytest.mark.parametrize(("own_memory", "variant"), [(False, ""), (True, "@kv4s10")])
def test_row_sizes_and_the_place_of_attention_do_not_depend_on_workload_or_variant(
    source: ModelSource, tight: dict[bool, EnginePlan], own_memory: bool, variant: str
) -> None:
    memory = {"own_memory": own_memory, "max_memory": TIGHT[own_memory]}
    searched = planned(source, GENERATION, variant=variant, **memory) if variant else tight[own_memory]  # type: ignore[arg-type]
    assert searched.automatic is not None
    others = [planned(source, None, policy=asked, **memory) for asked in (ROWS, replace(ROWS, auto=False))]  # type: ignore[arg-type]
    numerics = {(p.policy.gpu_batch_size, p.policy.gpu_batch_tokens, p.policy.cpu_attention) for p in (searched, *others)}
    assert len(numerics) == 1


@pytest.mark.parametrize("own_memory", [False, True])
def test_packed_weights_leave_the_numerics_alone(source: ModelSource, own_memory: bool) -> None:
    device, profile = MACHINES[own_memory]
    plain = planned(source, None, own_memory=own_memory, max_memory=TIGHT[own_memory])
    shapes = with_packed_weights(shapes_of(source.empty, plain_formats(source.empty), source.dtype), 4.5, "w4")
    half: MaxMemory = {"device": "10MiB", "host": "3MiB"}
    options = EngineOptions(device, ROWS, workload=GENERATION, profile=profile, limits=parse_max_memory(half))
    space = replace(plain.memory.space, available={**plain.memory.space.available, **options.limits})
    if not own_memory:
        space = replace(space, available={**space.available, "device": 11 * 2**20, "host": 11 * 2**20})
    found = automatic_policy(source, shapes, plain.policy, space, options)
    assert found is not None
    for name in ("gpu_batch_size", "gpu_batch_tokens", "cpu_attention"):
        assert getattr(found.choice.policy, name) == getattr(plain.policy, name)


@pytest.mark.parametrize(
    "kept",
    [{"prefetch": 2, "num_gpu_batches": 3, "overlap": False}, {"block_tokens": 96, "weights": (0.0, 0.2, 0.8)}],
    ids=str,
)
def test_fields_that_the_user_gave_are_kept(source: ModelSource, kept: Mapping[str, Any]) -> None:
    found = planned(source, GENERATION, max_memory=TIGHT[False], policy=replace(ROWS, **kept))
    assert found.automatic is not None
    for name, value in kept.items():
        assert getattr(found.policy, name) == pytest.approx(value, abs=0.2)  # shares are those of whole layers


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"policy": replace(ROWS, auto=False)}, "given without `auto`"), ({"workload": None}, "no jobs are known")],
    ids=["plain", "unknown"],
)
def test_without_auto_or_without_a_workload_nothing_is_searched(
    source: ModelSource, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="flexgen_helm.runtime.planning")
    found = planned(source, max_memory=TIGHT[False], **{"workload": GENERATION, **options})
    assert found.automatic is None
    (message,) = [record.getMessage() for record in caplog.records]
    assert "profile cpu is not used" in message
    assert reason in message
    default = planned(source, None, max_memory=TIGHT[False], policy=replace(ROWS, auto=False))
    assert replace(found.policy, auto=False) == default.policy
    assert found.memory.weights == default.memory.weights


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError("nothing moves")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"profile": replace(cpu(), products=())}, "product"),
        ({"profile": replace(cpu(), disk_read=None)}, "disk"),
        ({"rows": "single"}, "packed rows"),
        ({"order": "row"}, "zigzag"),
        ({}, "ZeroDivisionError: nothing moves"),
    ],
    ids=["no-products", "no-disk", "single", "order", "fault"],
)
def test_a_search_that_fails_leaves_the_default_and_says_why(
    source: ModelSource,
    options: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not options:
        monkeypatch.setattr(automatic, "choose_policy", broken)
    default = planned(source, None, max_memory=TIGHT[False])
    caplog.clear()
    found = planned(source, GENERATION, max_memory=TIGHT[False], **options)
    assert found.automatic is None
    assert (found.policy, found.memory.weights) == (default.policy, default.memory.weights)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("the default policy is used, because none could be searched: ")
    assert reason in warning


def test_a_limit_that_nothing_fits_is_an_error(source: ModelSource) -> None:
    with pytest.raises(PolicyError, match="least that this model runs in"):
        planned(source, GENERATION, max_memory={"host": "2MiB"})


def test_the_plan_is_in_the_log_before_anything_runs(source: ModelSource, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="flexgen_helm.runtime.planning")
    planned(source, GENERATION, own_memory=True, max_memory=TIGHT[True])
    text = "\n".join(record.getMessage() for record in caplog.records)
    for part in ("weights: ", "K and V: ", "predicted peaks", "tokens/s", "sweeps", "binding: "):
        assert part in text


def test_a_profile_of_another_kind_of_machine_is_refused(source: ModelSource) -> None:
    with pytest.raises(PolicyError, match=r"profile t4 is of a machine with a device with a memory of its own.*leave it out"):
        planned(source, GENERATION, max_memory=TIGHT[False], profile=t4())


def test_a_profile_that_cannot_be_read_is_one_clear_error(bench: Workbench, tmp_path: Path) -> None:
    folder = str(bench.folder("llama"))
    with pytest.raises(FlexGenError, match=r"no profile 'hal9000'.*laptop-8gib"):
        Engine.from_pretrained(folder, profile="hal9000")
    torn = tmp_path / "torn.json"
    write_profile(cpu(), torn)
    torn.write_text(torn.read_text()[:200])
    with pytest.raises(FlexGenError, match=r"torn.json cannot be read as JSON"):
        Engine.from_pretrained(folder, profile=torn)


def test_jobs_that_cannot_be_served_do_not_disturb_the_planning(source: ModelSource) -> None:
    good = [Job(token_ids=random_tokens(i, 20), max_new_tokens=4) for i in range(3)]
    bad = [Job(token_ids=[10**6], max_new_tokens=4), Job(prompt="this model has no tokenizer", max_new_tokens=4)]
    assert known_workload(source, [bad[0], *good, bad[1]]) == known_workload(source, good)
    with pytest.raises(InvalidJob, match="list of jobs"):
        known_workload(source, good[0])  # type: ignore[arg-type]
    with pytest.raises(InvalidJob, match="has a str"):
        known_workload(source, ["a prompt"])  # type: ignore[list-item]


def test_a_job_that_never_fits_does_not_disturb_the_planning(source: ModelSource, tight: dict[bool, EnginePlan]) -> None:
    huge = Workload((*GENERATION.prompts, *Workload.uniform(1, 10**6, 4).prompts))
    found = planned(source, huge, max_memory=TIGHT[False])
    assert found.automatic is not None
    assert found.policy == tight[False].policy


def test_greedy_completions_count_once(source: ModelSource) -> None:
    greedy = Job(token_ids=random_tokens(1, 20), max_new_tokens=4, num_completions=3)
    for job, count in ((greedy, 1), (replace(greedy, temperature=1.0), 3)):
        found = known_workload(source, [job])
        assert found is not None
        assert found.prompts[0].new_tokens == (4,) * count


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """Tiny models of six layers, most of which can be on disk."""
    made = Workbench(tmp_path_factory.mktemp("deep"), num_layers=6)
    yield made
    made.close()


def answers(folder: Path, jobs: Sequence[Job], device: Device, **options: Any) -> tuple[list[Any], Engine]:
    with Engine.from_pretrained(str(folder), device=device, policy=ROWS, **options) as engine:
        return engine.run(jobs), engine


def test_a_run_is_predicted_and_measured(deep: Workbench, tmp_path: Path) -> None:
    jobs = fixed_mix(3, 6)
    limits = {"max_memory": {"host": "2.6MiB"}, "offload_folder": tmp_path, "profile": cpu()}
    _, searched = answers(deep.folder("llama"), jobs, CPU, workload=jobs, **limits)
    expected = searched.stats.predicted
    assert expected is not None
    assert expected.sweeps == searched.stats.sweeps
    assert searched.stats.as_dict()["predicted_seconds"] == expected.seconds > 0
    assert f"{expected.seconds:.3g} s predicted, " in str(searched.stats.forecast_text())
    _, plain = answers(deep.folder("llama"), jobs[:1], CPU, **limits)
    assert plain.stats.predicted is None
    assert plain.stats.forecast_text() is None


@settings(max_examples=4)
@given(seed=st.integers(0, 10**6), room=st.integers(0, 12))
def test_answers_are_those_of_the_default_policy_by_a_bit(
    deep: Workbench, tmp_path_factory: pytest.TempPathFactory, seed: int, room: int
) -> None:
    """Whatever the search picks, for machines drawn at random and memory from the least that works."""
    profile = random_triple(seed).profile
    device = MACHINES[profile.own_memory][0]
    jobs = fixed_mix(seed, 6)
    expected = deep.engine("llama", policy=replace(ROWS, auto=False)).run(jobs)
    limits = {"device": f"{1.52 + room / 40}MiB", "host": f"{0.5 + room / 20}MiB"}
    if not profile.own_memory:
        limits = {"host": f"{2.62 + room / 60}MiB"}
    folder = tmp_path_factory.mktemp("slabs")
    found, engine = answers(
        deep.folder("llama"), jobs, device, workload=jobs, profile=profile, max_memory=limits, offload_folder=folder
    )
    assert found == expected
    assert engine.stats.predicted is not None, "nothing was searched"
    assert (engine.policy.gpu_batch_size, engine.policy.gpu_batch_tokens) == (16, 32)
