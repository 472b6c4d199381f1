"""Compare the installed version of transformers with the range of tested versions."""

from __future__ import annotations

import importlib.metadata
import logging

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from transformers import __version__ as library_version

logger = logging.getLogger(__name__)


def tested_versions() -> SpecifierSet:
    """Return the range of transformers versions in setup.cfg, from the oldest to the newest that passed the tests."""
    requirements = map(Requirement, importlib.metadata.requires("flexgen_helm") or ())
    return next(requirement.specifier for requirement in requirements if requirement.name == "transformers")


def warn_if_untested() -> None:
    """Log one warning if the installed version of transformers is outside of the tested range."""
    tested = tested_versions()
    if not tested.contains(library_version, prereleases=True):
        logger.warning(
            "transformers %s is not a tested version: flexgen_helm was tested with %s. Every model is still checked at load. "
            "If a model is refused, install a tested version: pip install 'transformers%s'",
            library_version,
            tested,
            tested,
        )
