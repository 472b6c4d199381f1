"""Names of compressed variants: every name of the grammar, what it means, and what is refused."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.compression.config import (
    CompressionConfig,
    parse,
    resolve,
    split_variant,
    with_variant,
)
from flexgen_helm.errors import CompressionError

EXAMPLES = settings(derandomize=True, max_examples=500, deadline=None)
W4 = CompressionConfig(bits=4.5)

GOOD: dict[str, tuple[str, dict[str, Any], str]] = {
    "w2": ("w2", {"bits": 2.5}, "2-bit weights"),
    "w3": ("w3", {"bits": 3.5}, "3-bit weights"),
    "w4": ("w4", {"bits": 4.5}, "4-bit weights"),
    "w8": ("w8", {"bits": 8.5}, "8-bit weights"),
    "w4-minmax": ("w4-minmax", {"bits": 4.5, "scheme": "minmax"}, "4-bit minmax weights"),
    "w4-self": ("w4-self", {"bits": 4.5, "scheme": "self"}, "4-bit self-fitted weights"),
    "w3-entropy": ("w3-entropy", {"bits": 3.5, "scheme": "entropy"}, "3-bit entropy-coded weights"),
    "w3.5-entropy": ("w3-entropy", {"bits": 3.5, "scheme": "entropy"}, "3-bit entropy-coded weights"),
    "w3.25-entropy": ("w3.25-entropy", {"bits": 3.25, "scheme": "entropy"}, "3.25-bit weights"),
    "w4.0-entropy": ("w4.0-entropy", {"bits": 4.0, "scheme": "entropy"}, "4.0-bit weights"),
    "w4.00-entropy": ("w4.0-entropy", {"bits": 4.0, "scheme": "entropy"}, "4.0-bit weights"),
    "w3.20-entropy": ("w3.2-entropy", {"bits": 3.2, "scheme": "entropy"}, "3.2-bit weights"),
    "kv4": ("kv4", {"k_bits": 4, "v_bits": 4}, "4-bit K/V"),
    "k4v4": ("kv4", {"k_bits": 4, "v_bits": 4}, "4-bit K/V"),
    "k4": ("k4", {"k_bits": 4}, "4-bit K"),
    "k4v16": ("k4", {"k_bits": 4}, "4-bit K"),
    "k16v2": ("v2", {"v_bits": 2}, "2-bit V"),
    "k8v4": ("k8v4", {"k_bits": 8, "v_bits": 4}, "8-bit K, 4-bit V"),
    "s10": ("s10", {"sparsity": 10}, "10 % of V"),
    "w4kv8": ("w4kv8", {"bits": 4.5, "k_bits": 8, "v_bits": 8}, "4-bit weights, 8-bit K/V"),
    "w4kv16": ("w4", {"bits": 4.5}, "4-bit weights"),
    "w4k8s5-minmax": (
        *("w4k8s5-minmax", {"bits": 4.5, "scheme": "minmax", "k_bits": 8, "sparsity": 5}),
        "4-bit minmax weights, 8-bit K, 5 % of V",
    ),
    "w4kv4s10-flexgen": (
        "w4kv4s10-flexgen",
        {"bits": 4.5, "scheme": "minmax", "k_bits": 4, "v_bits": 4, "sparsity": 10, "flexgen": True},
        "FlexGen: 4-bit weights, 4-bit K/V, 10 % of V",
    ),
    "kv4-flexgen": ("kv4-flexgen", {"k_bits": 4, "v_bits": 4, "flexgen": True}, "FlexGen: 4-bit K/V"),
    "kv16": ("", {}, ""),
}
"""Names with their canonical form, their fields and their words, from the rules in `docs/compression.md`."""

UNKNOWN = (
    *("", "w", "w1", "w5", "w16", "w04", "W4", "w4 ", " w4", "w4.", "w.5-entropy", "w9.0-entropy", "w3.125-entropy"),
    *("kv", "kv3", "k", "v5", "kv4k4", "v4k4", "kv4v4", "s", "s0", "s100", "s05", "s1.5", "kv4w4", "s10w4", "w4-", "-"),
    *("w4-gptq", "w4-minmax-flexgen", "w4_minmax", "w5-entropy", "w\uff14", "bf16", "main", "w4@w4"),
)
MISFITS = {
    "w3.25": "needs `-entropy`, as in `w3.25-entropy`. Otherwise give one of `w2`, `w3`, `w4`, `w8`.",
    "w4.5": "needs `-entropy`",
    "w4.0-minmax": "needs `-entropy`",
    "w4.5kv4-flexgen": "needs `-entropy`",
    "w8.75-entropy": "Give 2.0 to 8.5",
    "kv4-minmax": "Give their bits, such as `w4`",
    "s10-self": "Give their bits",
    "-entropy": "Give their bits",
    "-flexgen": "needs K or V of less than 16 bits, or `s`",
    "w4-flexgen": "For FlexGen's weights alone write `-minmax`",
    "w4kv16-flexgen": "needs K or V",
}


@pytest.mark.parametrize("text", GOOD)
def test_names_and_what_they_mean(text: str) -> None:
    canonical, fields, words = GOOD[text]
    config = parse(text)
    assert config == CompressionConfig(**fields)
    assert (config.canonical, config.description) == (canonical, words)


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_names_are_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(CompressionError) as raised:
        parse(text)
    assert f"no variant `@{text}` of a model. There are `w2`, `w3`, `w4`, `w8` (bits of a weight)" in str(raised.value)
    assert "-minmax" in str(raised.value)


@pytest.mark.parametrize("text", MISFITS)
def test_parts_that_do_not_go_together_are_refused_with_the_reason(text: str) -> None:
    with pytest.raises(CompressionError) as raised:
        parse(text)
    assert str(raised.value).startswith(f"There is no variant `@{text}` of a model. ")
    assert MISFITS[text] in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        *({"bits": 4}, {"bits": "4.5"}, {"bits": True}, {"bits": 4.25}, {"bits": 1.5, "scheme": "entropy"}),
        *({"bits": 3.125, "scheme": "entropy"}, {"bits": float("nan"), "scheme": "entropy"}, {"scheme": "minmax"}),
        *({"bits": 4.5, "scheme": "gptq"}, {"k_bits": 3}, {"v_bits": None}, {"k_bits": 4.0}, {"sparsity": 0}),
        *({"sparsity": 0.1}, {"sparsity": True}, {"flexgen": True}, {"flexgen": True, "bits": 4.5, "sparsity": 1}),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(CompressionError):
        CompressionConfig(**fields)


decimals = st.integers(200, 850).map(lambda hundredths: f"{hundredths / 100:.2f}")
weights = st.sampled_from(["", "w2", "w3", "w4", "w8"]) | decimals.map("w{}".format)
bits = st.sampled_from([2, 4, 8, 16])
caches = st.one_of(
    st.just(""),
    *(bits.map(f"{name}{{}}".format) for name in ("kv", "k", "v")),
    st.tuples(bits, bits).map(lambda both: f"k{both[0]}v{both[1]}"),
)
sparsities = st.just("") | st.integers(1, 99).map("s{}".format)
suffixes = st.sampled_from(["", "-minmax", "-self", "-entropy", "-flexgen"])


@given(weights, caches, sparsities, suffixes)
@EXAMPLES
def test_a_canonical_name_means_itself(weight: str, cache: str, sparsity: str, suffix: str) -> None:
    """Over the whole grammar, of which some names do not go together."""
    try:
        config = parse(f"{weight}{cache}{sparsity}{suffix}")
    except CompressionError:
        return
    assert bool(config.canonical) == (config != CompressionConfig()) == bool(config.description)
    if config.canonical:
        assert parse(config.canonical) == config
        assert parse(config.canonical).canonical == config.canonical
        assert split_variant(with_variant("org/model", config)) == ("org/model", config)


def test_variants_differ_in_names_and_in_words() -> None:
    """HELM's tables show the words; two rows must not look the same."""
    texts = [
        "".join(parts)
        for parts in itertools.product(
            ["", "w2", "w4", "w4.0", "w4.25"],
            ["", "kv4", "k4", "v4", "k8v4"],
            ["", "s10"],
            ["", "-minmax", "-self", "-entropy", "-flexgen"],
        )
    ]
    configs = set()
    for text in texts:
        try:
            configs.add(parse(text))
        except CompressionError:
            continue
    assert len(configs) > 100
    assert len({config.canonical for config in configs}) == len({config.description for config in configs}) == len(configs)


def test_weights_have_a_name_of_their_own() -> None:
    """K and V change no slab of weights."""
    pairs = {"kv4": "plain", "w4": "w4", "w4kv4s10": "w4", "w4kv4-flexgen": "w4-minmax", "w3.25kv8-entropy": "w3.25-entropy"}
    assert {text: parse(text).weight_scheme for text in pairs} == pairs


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/model@w4", ("org/model", W4)),
        ("/abs/path/model@w4", ("/abs/path/model", W4)),
        ("dir/sub/model@w4", ("dir/sub/model", W4)),
        ("~/model@w4", ("~/model", W4)),
        ("model@w4", ("model", W4)),
        ("org/model#v1@w4", ("org/model#v1", W4)),
        ("/abs/model@v1@w4", ("/abs/model@v1", W4)),
        ("org/model", ("org/model", None)),
        ("/abs/@path/model", ("/abs/@path/model", None)),
        ("@w4", ("@w4", None)),
        ("org/@w4", ("org/@w4", None)),
    ],
)
def test_the_last_at_sign_splits(name: str, parts: tuple[str, CompressionConfig | None]) -> None:
    assert split_variant(name) == parts


def test_an_existing_folder_of_the_full_name_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model@w4").mkdir()
    (tmp_path / "model").mkdir()
    with caplog.at_level(logging.INFO, logger="flexgen_helm"):
        assert split_variant(f"{tmp_path}/model@w4") == (f"{tmp_path}/model@w4", None)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/model@w4 is a folder, so `@w4` names no compressed variant"
    ]
    assert split_variant(f"{tmp_path}/model@w4@w4") == (f"{tmp_path}/model@w4", W4)
    monkeypatch.chdir(tmp_path)
    assert split_variant("model@w4") == ("model@w4", None)
    assert split_variant("model@w8") == ("model", replace(W4, bits=8.5))


@pytest.mark.parametrize("text", ["w2", "w3.25-entropy", "w4-self", "kv8", "k4", "w4v4", "s10", "w4kv4s10-flexgen"])
def test_every_part_of_a_name_is_served(text: str) -> None:
    assert resolve(f"org/model@{text}") == resolve("org/model", text) == ("org/model", parse(text))


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("w4", "plain"),
        ("kv4", "kv4"),
        ("k4s5", "k4"),
        ("k4v2", "k4v2-cut"),
        ("s10", "plain"),
        ("s10-flexgen", "plain-flexgen"),
        ("kv2-flexgen", "kv2-flexgen"),
    ],
)
def test_the_caches_scheme_is_all_that_decides_stored_numbers(text: str, scheme: str) -> None:
    assert parse(text).cache_scheme == scheme


def test_a_variant_may_be_named_twice_but_not_two_of_them() -> None:
    assert resolve("org/model@w3.5-entropy", "w3-entropy") == ("org/model", CompressionConfig(bits=3.5, scheme="entropy"))
    assert resolve("org/model", W4) == ("org/model", W4)
    assert resolve("org/model@kv16") == resolve("org/model", CompressionConfig()) == ("org/model", None)
    with pytest.raises(CompressionError, match="names the variant `w4`, but compression is `w8`"):
        resolve("org/model@w4", "w8")
    with pytest.raises(CompressionError, match="compression is 4"):
        resolve("org/model", 4)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="no variant `@`"):
        resolve("org/model", "")
