"""What Inspect finds through its entry points: the provider `flexgen`. No torch before a model of it is made."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="flexgen")
def flexgen() -> type[ModelAPI]:
    """Return the provider of models named ``flexgen/<folder or hub name>[@<variant>]``."""
    from flexgen_helm.harnesses.inspect_provider import FlexGenAPI

    return FlexGenAPI
