"""A regression gate: runs are checked against a baseline, and each gate passes, fails or says that it could not decide."""

from flexgen_helm.gate.checking import Check, check
from flexgen_helm.gate.config import GateConfig, parse_config, read_config
from flexgen_helm.gate.output import table
from flexgen_helm.gate.verdict import Checked, Verdict

__all__ = ["Check", "Checked", "GateConfig", "Verdict", "check", "parse_config", "read_config", "table"]
