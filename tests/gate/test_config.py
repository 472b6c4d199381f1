"""`gate.yaml`: what holds without one, what can be written, and one clear message for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_helm.gate.config import SPECS, ConfigError, GateConfig, Rule, parse_config, read_config


def test_defaults() -> None:
    config = read_config(None)
    assert list(config.rules) == list(SPECS)
    assert {name for name, rule in config.rules.items() if not rule.enabled} == {"lossless", "tolerance", "throughput"}
    assert not any(rule.required for rule in config.rules.values())
    assert parse_config({}) == GateConfig()


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text("# nothing\n")
    assert read_config(tmp_path / "gate.yaml") == GateConfig()


def test_what_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text(
        "gates:\n  flips: {threshold: 1e-3, required: true}\n  kl: {threshold: 0.02}\n  top1: false\n  throughput: true\n"
        "lm_eval: {metric: acc_norm, filter: none}\n"
    )
    config = read_config(file)
    assert config.rules["flips"] == Rule(True, 0.001, required=True)
    assert config.rules["kl"] == Rule(True, 0.02)
    assert not config.rules["top1"].enabled
    assert config.rules["throughput"] == Rule(True, 0.9)
    assert config.rules["margin"] == Rule(True, 0.01)
    assert (config.lm_eval.metric, config.lm_eval.filter) == ("acc_norm", "none")


def test_lossless_brings_the_tolerance_that_decides_elsewhere() -> None:
    both = parse_config({"gates": {"lossless": True}})
    assert (both.rules["tolerance"].enabled, both.rules["tolerance"].required) == (True, True)
    assert not both.rules["lossless"].required
    alone = parse_config({"gates": {"lossless": {"required": True}, "tolerance": False}})
    assert (alone.rules["lossless"].required, alone.rules["tolerance"].enabled) == (True, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gates: {flip: true}", "unknown key `flip`. The keys are lossless, tolerance, flips"),
        ("gate: {}", "the file has the unknown key `gate`"),
        ("[1, 2]", "the file must be a mapping"),
        ("gates: [flips]", "`gates` must be a mapping"),
        ("gates: {flips: 0.01}", "`gates.flips` must be a mapping with some of threshold, required, but is 0.01"),
        ("gates: {flips: {level: 0.01}}", "`gates.flips` has the unknown key `level`"),
        ("gates: {flips: {threshold: 0.6}}", "above 0 and at most 0.5"),
        ("gates: {flips: {threshold: 0}}", "above 0 and at most 0.5"),
        ("gates: {recovery: {threshold: 101}}", "at most 100"),
        ("gates: {kl: {threshold: .inf}}", "must be a number above 0"),
        ("gates: {kl: {threshold: .nan}}", "must be a number above 0"),
        ("gates: {kl: {threshold: true}}", "is True; it must be a number"),
        ("gates: {kl: {threshold: [1]}}", "must be a number"),
        ("gates: {kl: {threshold: low}}", "is 'low'; it must be a number"),
        ("gates: {lossless: {threshold: 1}}", "has no threshold"),
        ("gates: {flips: {required: 1}}", "`gates.flips.required` is 1; it must be true or false"),
        ("lm_eval: {metric: 3}", "`lm_eval.metric` is 3"),
        ("lm_eval: {task: a}", "unknown key `task`"),
        ("gates: {flips: ", "cannot be read as YAML"),
        ("gates: {1: true}", "unknown key `1`"),
    ],
)
def test_everything_else_is_one_clear_message(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_config(file)
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(file))
    assert "Correct" in str(raised.value) or "Remove" in str(raised.value)


def test_a_file_that_is_missing_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_config(tmp_path / name)
