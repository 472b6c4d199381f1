"""Which gates judge, with which thresholds: ``gate.yaml``, or what holds without one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from flexgen_helm.errors import FlexGenError

Change = Literal["same", "16-bit", "8-bit", "low-bit"]
"""What a candidate changes: only the code or the sizes of a computation; the dtype; to 7 bits or more; to fewer."""


class ConfigError(FlexGenError):
    """A configuration of gates that cannot be used."""


@dataclass(frozen=True)
class Spec:
    """What there is to know of a gate."""

    unit: Literal["", "p", "share", "percent", "nats"]
    """Of value and threshold; ``p`` a probability, empty a plain number."""
    threshold: float | Mapping[str, float] | None
    """Without a configuration, or by `Change`; None: the gate has none."""
    lowest: float = 0.0
    """A threshold lies above this,"""
    highest: float = math.inf
    """and at or below this."""
    enabled: bool = True
    vouches: bool = True
    """Whether a pass alone says that the model answers as well as before."""


SPECS: Mapping[str, Spec] = {
    "lossless": Spec("", None, enabled=False),
    "tolerance": Spec("nats", 1e-4, highest=1.0, enabled=False),
    "flips": Spec("p", 0.01, highest=0.5),
    "margin": Spec("share", 0.01, highest=1.0),
    "recovery": Spec("percent", 99.0, highest=100.0),
    "logprob": Spec("nats", {"same": 1e-3, "16-bit": 0.01, "8-bit": 0.01, "low-bit": 0.1}),
    "logprob_spread": Spec("nats", {"same": 1e-3, "16-bit": 0.05, "8-bit": 0.05, "low-bit": 0.3}),
    "kl": Spec("nats", {"same": 1e-4, "16-bit": 1e-3, "8-bit": 2e-3, "low-bit": 0.05}),
    "top1": Spec("share", {"same": 0.995, "16-bit": 0.98, "8-bit": 0.97, "low-bit": 0.85}, highest=1.0),
    "length": Spec("share", 0.9, highest=1.0, vouches=False),
    "unparsable": Spec("share", 0.01, highest=1.0, vouches=False),
    "throughput": Spec("share", 0.9, enabled=False, vouches=False),
}
"""The gates in the order in which they are shown. Sources of the thresholds: docs/gate.md."""


@dataclass(frozen=True)
class Rule:
    """How one gate judges."""

    enabled: bool
    threshold: float | Mapping[str, float] | None
    required: bool = False
    """Whether an inconclusive verdict stops the build."""

    def limit(self, change: Change | None) -> float | None:
        """Return the threshold for a candidate; None where it depends on a change that is not known."""
        if isinstance(self.threshold, Mapping):
            return None if change is None else self.threshold[change]
        return self.threshold


@dataclass(frozen=True)
class LmEvalChoice:
    """What is read of lm-eval's files where they hold several."""

    metric: str | None = None
    """Name of the metric; None: ``exact_match``, ``acc`` or ``acc_norm``, else the first."""
    filter: str | None = None
    """Name of the filter; None: the first in the file."""


@dataclass(frozen=True)
class GateConfig:
    """A whole configuration."""

    rules: Mapping[str, Rule] = field(
        default_factory=lambda: {name: Rule(spec.enabled, spec.threshold) for name, spec in SPECS.items()}
    )
    """By gate, in the order of `SPECS`."""
    lm_eval: LmEvalChoice = LmEvalChoice()


def read_config(file: Path | None) -> GateConfig:
    """Read ``gate.yaml``.

    Args:
        file: None: the defaults.

    Raises:
        ConfigError: The file cannot be read, or has an unknown key, a value of a wrong type or one out of range.
    """
    if file is None:
        return GateConfig()
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as YAML ({' '.join(str(error).split())}). Correct the file.") from error
    try:
        return parse_config({} if content is None else content)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def parse_config(content: Any) -> GateConfig:
    """Make a configuration of what YAML holds.

    Args:
        content: ``gates``, a mapping from a gate to ``true``, ``false`` or a mapping with ``threshold`` and ``required``; and
            ``lm_eval``, a mapping with ``metric`` and ``filter``.

    Raises:
        ConfigError: See `read_config`.
    """
    top = _mapping(content, "the file", ("gates", "lm_eval"))
    written = _mapping(top.get("gates", {}), "`gates`", tuple(SPECS))
    rules = {name: _rule(name, rule, written.get(name)) for name, rule in GateConfig().rules.items()}
    if rules["lossless"].enabled and "tolerance" not in written:
        # Where bits cannot decide, tolerances do, and then they must.
        rules["tolerance"] = replace(rules["tolerance"], enabled=True, required=True)
    chosen = _mapping(top.get("lm_eval", {}), "`lm_eval`", ("metric", "filter"))
    for name, value in chosen.items():
        if not isinstance(value, str):
            raise ConfigError(f"`lm_eval.{name}` is {value!r}; it must be a name. Correct it.")
    return GateConfig(rules, LmEvalChoice(**chosen))


def _rule(name: str, rule: Rule, written: Any) -> Rule:
    if written is None:
        return rule
    if isinstance(written, bool):
        return replace(rule, enabled=written)
    options = _mapping(written, f"`gates.{name}`", ("threshold", "required"))
    required = options.get("required", False)
    if not isinstance(required, bool):
        raise ConfigError(f"`gates.{name}.required` is {required!r}; it must be true or false. Correct it.")
    threshold = _threshold(name, options["threshold"]) if "threshold" in options else rule.threshold
    return Rule(True, threshold, required)


def _threshold(name: str, value: Any) -> float:
    spec = SPECS[name]
    if spec.threshold is None:
        raise ConfigError(f"`gates.{name}` has no threshold, because nothing may change. Remove the key.")
    try:
        # YAML takes 1e-4, which has no point, for text.
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not spec.lowest < number <= spec.highest or math.isinf(number):
        most = "" if math.isinf(spec.highest) else f" and at most {spec.highest:g}"
        raise ConfigError(
            f"`gates.{name}.threshold` is {value!r}; it must be a number above {spec.lowest:g}{most}. Correct it."
        )
    return number


def _mapping(content: Any, what: str, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{what} must be a mapping with some of {', '.join(names)}, but is {content!r:.80}. Correct it.")
    if unknown := [str(key) for key in content if key not in names]:
        raise ConfigError(f"{what} has the unknown key `{unknown[0]}`. The keys are {', '.join(names)}. Correct it.")
    return content
