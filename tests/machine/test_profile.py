"""Profiles as JSON: round trips, errors, and the profiles that ship with the package."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.errors import FlexGenError
from flexgen_helm.machine.named_rates import named_rates
from flexgen_helm.machine.profile import (
    AttentionRate,
    LayerTime,
    MachineProfile,
    ProcessorSeconds,
    ProductRate,
    Rate,
    UnpackRate,
)
from flexgen_helm.machine.profile_file import (
    from_json,
    named_profile,
    profile_names,
    read_profile,
    to_json,
    write_profile,
)
from flexgen_helm.types import TIERS

POSITIVE, NUMBER, COUNT = st.floats(1e-9, 1e18), st.floats(0, 1e18), st.integers(1, 2**20)
RATES, TEXT = st.builds(Rate, POSITIVE, NUMBER, NUMBER), st.text(max_size=12)
KINDS, PLACES = st.sampled_from(["prefill", "decode"]), st.sampled_from(["device", "host"])
PROCESSOR = st.builds(ProcessorSeconds, POSITIVE, NUMBER, NUMBER)


def some(member: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(member, max_size=2).map(tuple)


PROFILES = st.builds(
    MachineProfile,
    *(TEXT, TEXT, TEXT, TEXT),
    own_memory=st.booleans(),
    is_gpu=st.booleans(),
    threads=COUNT,
    memory=st.fixed_dictionaries(dict.fromkeys(TIERS, st.integers(0, 2**50))),
    device_read=RATES,
    host_read=RATES,
    host_to_device=st.none() | RATES,
    device_to_host=st.none() | RATES,
    duplex=POSITIVE,
    disk_read=st.none() | RATES,
    disk_write=st.none() | RATES,
    products=some(st.builds(ProductRate, TEXT, COUNT, RATES, st.booleans())),
    attention=some(st.builds(AttentionRate, PLACES, KINDS, TEXT, RATES)),
    unpack=some(st.builds(UnpackRate, PLACES, TEXT, RATES, TEXT)),
    call_seconds=st.dictionaries(KINDS, NUMBER),
    operation_seconds=NUMBER,
    processor_call_seconds=st.dictionaries(KINDS, NUMBER),
    processor_operation_seconds=NUMBER,
    layers=some(
        st.builds(LayerTime, TEXT, TEXT, KINDS, COUNT, POSITIVE, NUMBER, st.booleans(), NUMBER, NUMBER, st.none() | PROCESSOR)
    ),
)
SMALLEST: dict[str, Any] = {
    **dict.fromkeys(("name", "date", "source", "device"), "x"),
    "own_memory": False,
    "is_gpu": False,
    "threads": 2,
    "memory": {"device": 8e9, "host": 8e9, "disk": 0},
    "device_read": 2e10,
    "host_read": {"value": 2e10},
}
"""A profile as one would write it by hand: everything with a default is left out."""


@given(profile=PROFILES)
@settings(max_examples=25)
def test_what_is_written_is_read(profile: MachineProfile) -> None:
    assert from_json(to_json(profile)) == profile


def test_a_file_by_hand_may_leave_out_what_has_a_default(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(SMALLEST))
    profile = named_profile(tmp_path / "mine.json")
    assert profile.device_read == profile.host_read == Rate(2e10, 0.0)
    assert profile.memory == {"device": 8_000_000_000, "host": 8_000_000_000, "disk": 0}
    assert (profile.products, profile.disk_read, profile.call_seconds) == ((), None, {})


PRODUCT = {"dtype": "float32", "tokens": 4, "rate": 1e9}
ATTENTION = {"place": "device", "kind": "decode", "format": "kv4", "rate": 1e9}
LAYER = {"model": "m", "dtype": "float32", "kind": "decode", "tokens": 4, "seconds": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thread": 4}, "thread is no field. Those are name, date"),
        ({"threads": None}, "threads is null, but must be a number of more than 0"),
        ({"threads": 0}, "threads is 0, but must be a number of more than 0"),
        ({"threads": 1.5}, "threads is 1.5, but must be a whole number"),
        ({"threads": True}, "threads is true, but must be a number"),
        ({"name": 3}, "name is 3, but must be a text"),
        ({"is_gpu": "no"}, 'is_gpu is "no", but must be true or false'),
        ({"device_read": -1}, "device_read.value is -1, but must be a number of more than 0"),
        ({"device_read": 0}, "device_read.value is 0, but must be a number of more than 0"),
        ({"device_read": "fast"}, 'device_read is "fast", but must be a rate'),
        ({"device_read": {"spread": 1}}, "device_read.value is missing"),
        ({"device_read": {"value": float("nan")}}, "device_read.value is NaN, but must be a number"),
        ({"device_read": {"value": 1, "spread": -0.1}}, "device_read.spread is -0.1, but must be a number of 0 or more"),
        ({"memory": {"device": 1, "host": 1}}, "memory.disk is missing. Add it: bytes of the tier"),
        ({"memory": {"device": 1, "host": 1, "disk": 1, "tape": 1}}, "memory has no 'tape'. It has device, host, disk"),
        ({"memory": 8}, "memory is 8, but must be an object with device, host, disk"),
        ({"products": PRODUCT}, "products is"),
        ({"products": [PRODUCT, {**PRODUCT, "token": 5}]}, "products[1].token is no field. Those are dtype, tokens, rate"),
        ({"products": [{**PRODUCT, "tokens": 0}]}, "products[0].tokens is 0, but must be"),
        ({"attention": [{**ATTENTION, "kind": "both"}]}, 'attention[0].kind is "both", but must be one of "prefill", "decode"'),
        ({"layers": [{**LAYER, "seconds": 0}]}, "layers[0].seconds is 0, but must be a number of more than 0"),
        ({"call_seconds": {"decode": -1}}, "call_seconds.decode is -1, but must be a number of 0 or more"),
        ({"duplex": 0}, "duplex is 0, but must be a number of more than 0"),
    ],
)
def test_every_wrong_field_is_named_with_what_it_must_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexGenError, match=re.escape(f"profile mine: {message}")) as raised:
        from_json(json.dumps(SMALLEST | changes), "profile mine")
    assert str(raised.value).endswith("docs/planning.md describes the fields.")


@pytest.mark.parametrize("name", SMALLEST)
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(FlexGenError, match=f"{name} is missing. Add it"):
        from_json(json.dumps({key: value for key, value in SMALLEST.items() if key != name}))


@pytest.mark.parametrize("text", ["", "{", "threads: 2", '{"a": 1, "a": 2}', "[" * 100_000])
def test_what_is_no_json_is_said(text: str) -> None:
    with pytest.raises(FlexGenError, match="cannot be read as JSON"):
        from_json(text)


def test_json_of_another_form_is_said() -> None:
    with pytest.raises(FlexGenError, match=re.escape("all of it is [1], but must be an object")):
        from_json("[1]")


def test_files_that_cannot_be_used_are_said(tmp_path: Path) -> None:
    with pytest.raises(FlexGenError, match=f"{tmp_path} cannot be read"):
        read_profile(tmp_path)
    (tmp_path / "latin").write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(FlexGenError, match="latin cannot be read"):
        read_profile(tmp_path / "latin")
    with pytest.raises(FlexGenError, match="cannot be written to"):
        write_profile(named_profile("t4"), tmp_path / "latin" / "out.json")


def test_an_unknown_name_lists_what_there_is() -> None:
    assert profile_names() == ["h100", "h200", "laptop-8gib", "t4"]
    with pytest.raises(FlexGenError, match=r"There is no profile 't5'.*h100, h200, laptop-8gib, t4, or a file"):
        named_profile("t5")


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_have_what_a_plan_needs(name: str) -> None:
    profile = named_profile(name)
    assert profile.name == name
    assert "stimate" in profile.source or "measured" in profile.source
    assert profile.own_memory == profile.is_gpu == (profile.host_to_device is not None) == (profile.device_to_host is not None)
    assert None not in (profile.disk_read, profile.disk_write)
    assert {rate.kind for rate in profile.attention} == set(profile.call_seconds) == {"prefill", "decode"}
    assert {"w4", "w4-entropy"} <= {rate.format for rate in profile.unpack if rate.place == "device"}
    assert not profile.is_gpu or {"w4-entropy", "lossless"} <= {rate.format for rate in profile.unpack if rate.place == "host"}
    # The processor reads its memory no slower than it attends.
    decode = [rate for rate in profile.attention if rate.kind == "decode"]
    assert all(
        rate.rate.value <= (profile.device_read if rate.place == "device" else profile.host_read).value for rate in decode
    )


def test_the_t4_is_the_papers_machine() -> None:
    """FlexGen, section 6: a T4 of 16 GB, 208 GB of RAM, 1.5 TB of disk; and the constants of its released cost model."""
    t4 = named_profile("t4")
    assert t4.memory == {"device": 15 * 2**30, "host": 208 * 2**30, "disk": 1_500_000_000_000}
    assert t4.host_to_device == t4.device_to_host == Rate(12e9)
    assert (t4.disk_read, t4.disk_write) == (Rate(2e9), Rate(1e9))
    assert [rate.rate.value for rate in t4.products] == [4.3e12, 21.24e12]
    found = {(rate.place, rate.kind): rate.rate.value for rate in t4.attention if rate.format == "float16"}
    assert found == {("device", "prefill"): 9.97e12, ("device", "decode"): 79e9, ("host", "decode"): 12.3e9}
    assert named_profile("h200").memory["device"] == 139 * 2**30
    assert named_profile("laptop-8gib").memory["host"] == 8 * 2**30


def test_everything_in_a_profile_has_a_name_of_its_own() -> None:
    names = [each.name for each in named_rates(named_profile("t4"))]
    assert len(set(names)) == len(names) == 6 + 2 + 5 + 8 + 2 + 1


def test_the_page_shows_a_profile_that_is_valid_and_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```json\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert from_json(example).threads == 8
    named = {
        field.name for each in (MachineProfile, LayerTime, UnpackRate, AttentionRate, ProductRate) for field in fields(each)
    }
    assert [name for name in sorted(named) if f"`{name}`" not in page and f'"{name}"' not in page] == []
    assert [name for name in profile_names() if f"`{name}`" not in page] == []


def test_processor_time_takes_the_place_of_the_clock_where_it_was_measured() -> None:
    busy = Rate(1e9, 0.5, 3e9)
    layer = LayerTime("m", "float32", "decode", 4, 3.0, 0.1, False, 2.0, 1.0, ProcessorSeconds(1.5, 1.2, 0.5))
    laptop = named_profile("laptop-8gib")
    profile = replace(
        laptop,
        device_read=busy,
        products=(ProductRate("float32", 4, busy), laptop.products[0]),
        processor_operation_seconds=1e-6,
        layers=(layer, replace(layer, processor=None)),
    )
    found = profile.by_processor_time()
    assert (found.device_read.value, found.host_read, found.disk_read) == (3e9, laptop.host_read, laptop.disk_read)
    assert [each.rate.value for each in found.products] == [3e9, laptop.products[0].rate.value]
    assert (found.operation_seconds, found.call_seconds) == (1e-6, laptop.call_seconds)
    assert [(each.seconds, each.next_seconds, each.record_seconds) for each in found.layers] == [
        (1.5, 1.2, 0.5),
        (3.0, 2.0, 1.0),
    ]
