"""The self-check is made once for equal models, code and machines; whatever decides its outcome makes it another check."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flexgen_helm
from flexgen_helm import Engine, Job
from flexgen_helm.attention.paged.trial import HeadShape
from flexgen_helm.cache_folder import cache_folder
from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.machine import identity
from flexgen_helm.rows import choice
from flexgen_helm.rows.choice import Passed, check_model
from flexgen_helm.rows.self_check import LayerCache, Verdict
from flexgen_helm.runtime import load_model
from flexgen_helm.runtime.verdicts import Check, recall, remember
from flexgen_helm.types import Numerics, WeightNumerics
from tests.jobs import random_tokens
from tests.models import SINGLE
from tests.workbench import OWN_MEMORY, POLICY, Workbench

JOBS = [Job(token_ids=random_tokens(3, 20), max_new_tokens=4, top_logprobs=3)]
CHECK = Check(WeightNumerics("0123", "float32"), POLICY, "auto", kv_dtype="float32", device=torch.device("cpu"), whole=True)
LAYERS = (LayerCache((8, 16), 0), LayerCache((), 640))
PASSED = Passed("single", Verdict(1.5e-7, False, LAYERS, (HeadShape(4, 2, 16, 24),)), "it keeps other state")


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were checked."""
    names = list[str]()

    def counted(loaded: Any, *arguments: Any, **options: Any) -> Any:
        names.append(loaded.name)
        return check_model(loaded, *arguments, **options)

    monkeypatch.setattr(load_model, "check_model", counted)
    return names


def engine(folder: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(str(folder), **{"device": "cpu", "policy": POLICY, **options})


def verdict_files() -> list[Path]:
    return sorted((cache_folder() / "verdicts").glob("*"))


OFFLOADED = {"device": OWN_MEMORY, "policy": dataclasses.replace(POLICY, weights=(0, 1, 0))}
"""Options with which the first layers are checked, and all layers streamed."""


@pytest.mark.parametrize("options", [{}, OFFLOADED], ids=["resident", "offloaded"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_model_is_checked_once(
    bench: Workbench, family: str, options: dict[str, Any], checked: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="flexgen_helm")
    found = []
    for _ in range(2):
        with engine(bench.folder(family), **options) as made:
            found.append((made.numerics, made.rows, made.run(JOBS)))
    assert found[0] == found[1]
    assert checked == [str(bench.folder(family))]
    (line,) = [record.getMessage() for record in caplog.records if "recheck" in record.getMessage()]
    assert "passed the self-check before" in line


def test_the_check_is_repeated_on_request(bench: Workbench, checked: list[str]) -> None:
    for recheck in (False, True, False):
        engine(bench.folder("llama"), recheck=recheck).close()
    assert len(checked) == 2


def test_what_was_found_is_logged_as_ever(
    bench: Workbench, checked: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model in single rows that is not bit-stable stays both, and every engine says so."""
    check = choice.CHECKS["single"]
    monkeypatch.setitem(
        choice.CHECKS, "single", lambda *given, **named: dataclasses.replace(check(*given, **named), bit_stable=False)
    )
    family = next(iter(SINGLE))
    for _ in range(2):
        caplog.clear()
        caplog.set_level("INFO", logger="flexgen_helm")
        with engine(bench.folder(family)) as made:
            assert made.rows == "single"
        assert re.search(f"runs in single rows .*{SINGLE[family].reason}", caplog.text)
        assert "bit-stability check failed" in caplog.text
    assert len(checked) == 1


def test_a_refusal_is_not_kept(bench: Workbench, checked: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match="computed wrongly"):
            engine(bench.folder(next(iter(SINGLE))), rows="packed")
    assert len(checked) == 2
    assert not verdict_files()


def of_another_form(text: str) -> str:
    """A record whose checksum is right."""
    record = json.loads(text)["record"] | {"verdict": {"worst_difference": 0.0, "bit_stable": True}}
    return json.dumps({"record": record, "sha256": hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()})


TORN = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "another kind": lambda text: text.replace('"packed"', '"both"'),
    "another number": lambda text: text.replace('"worst_difference": ', '"worst_difference": 1'),
    "without a checksum": lambda text: json.dumps(json.loads(text)["record"]),
    "no layers": of_another_form,
}


@pytest.mark.parametrize("harm", TORN.values(), ids=TORN)
def test_a_torn_file_is_replaced(bench: Workbench, checked: list[str], harm: Callable[[str], str]) -> None:
    engine(bench.folder("llama")).close()
    (file,) = verdict_files()
    whole = file.read_text()
    file.write_text(harm(whole))
    engine(bench.folder("llama")).close()
    assert len(checked) == 2
    assert [path.read_text() for path in verdict_files()] == [whole]


def test_a_folder_that_cannot_be_written_only_costs_time(
    bench: Workbench, checked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "verdicts").touch()
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path))
    for _ in range(2):
        engine(bench.folder("llama")).close()
    assert len(checked) == 2


def test_all_of_a_verdict_is_kept() -> None:
    remember(CHECK, PASSED)
    assert recall("org/model", CHECK) == PASSED


OTHER = {
    "weights": {"weights": WeightNumerics("4567", "float32")},
    "dtype": {"weights": WeightNumerics("0123", "bfloat16")},
    "sequences": {"policy": dataclasses.replace(POLICY, gpu_batch_size=32)},
    "tokens": {"policy": dataclasses.replace(POLICY, gpu_batch_tokens=64)},
    "rows": {"rows": "single"},
    "kv_dtype": {"kv_dtype": "bfloat16"},
    "device": {"device": torch.device("meta")},
    "part": {"whole": False},
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_another_model_or_policy_is_another_check(change: dict[str, Any]) -> None:
    remember(CHECK, PASSED)
    assert recall("org/model", dataclasses.replace(CHECK, **change)) is None


def test_placement_is_no_part_of_a_check() -> None:
    policy = dataclasses.replace(POLICY, num_gpu_batches=1, block_tokens=96, weights=(0, 1, 0), overlap=False)
    assert dataclasses.replace(CHECK, policy=policy).file == CHECK.file


def changed_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("changed = True")
    monkeypatch.setattr(flexgen_helm, "__file__", str(tmp_path / "__init__.py"))


def other_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(identity, "version", lambda name: f"{name} of tomorrow")


def other_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(identity, "_processor", lambda: ("model name: another",))


def other_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")


def other_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)


def other_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")


SURROUNDINGS = [changed_code, other_library, other_processor, other_kernels, other_threads, other_variable]


@pytest.mark.parametrize("change", SURROUNDINGS)
def test_other_code_or_another_machine_is_another_check(
    change: Callable[[pytest.MonkeyPatch, Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    remember(CHECK, PASSED)
    identity.code_identity.cache_clear()
    with monkeypatch.context() as patch:
        change(patch, tmp_path)
        found = recall("org/model", CHECK)
    identity.code_identity.cache_clear()
    assert found is None
    assert recall("org/model", CHECK) == PASSED


def test_numerics_are_those_of_a_fresh_check(bench: Workbench, checked: list[str]) -> None:
    """What is recalled is chosen by row sizes: another size is checked, and described as such."""
    described: list[Numerics] = []
    for size in (16, 32, 16):
        with engine(bench.folder("llama"), policy=dataclasses.replace(POLICY, gpu_batch_size=size)) as made:
            described.append(made.numerics)
    assert [numerics.rows.gpu_batch_size for numerics in described] == [16, 32, 16]
    assert len(checked) == 2
