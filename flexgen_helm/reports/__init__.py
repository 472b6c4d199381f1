"""What HELM has written for runs: read, compared and shown. `compare` returns the frames."""

from flexgen_helm.reports.comparing import Choices, Comparison, compare

__all__ = ["Choices", "Comparison", "compare"]
