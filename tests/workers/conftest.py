"""HELM's registries and fake engines, as in the tests of HELM's side."""

from __future__ import annotations

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from tests.helm.conftest import _deployments, loader, run_suite

__all__ = ["_deployments", "loader", "run_suite"]
