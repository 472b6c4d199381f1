"""Whether HELM, which is an extra, is installed. Imports nothing of it."""

from __future__ import annotations

import importlib.util

from flexgen_helm.errors import FlexGenError


def require_helm() -> None:
    """Refuse to go on without HELM.

    Raises:
        FlexGenError: It is not installed; the message says how to install it.
    """
    if importlib.util.find_spec("helm") is None:
        raise FlexGenError('HELM is not installed. Install it with `pip install "flexgen_helm[helm]"`.')
