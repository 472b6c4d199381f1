"""The HELM commands of an evaluation and the environment in which they run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexgen_helm.evaluation.suites import Suite
from flexgen_helm.helm.deployment import RUNNER
from flexgen_helm.workers.options import RUNNER as WORKERS_RUNNER
from flexgen_helm.workers.options import Workers

SUMMARIZER = "flexgen_helm.evaluation.summarizer.FlexGenSummarizer"
"""Shows what HELM's own shows, and figures of engines where a schema has a place for them."""
SAID_BY_NAME = ("name_or_path", "revision", "compression")
"""Arguments of an engine that follow from the name of a deployment."""


@dataclass(frozen=True)
class Evaluation:
    """A model on a suite."""

    deployment: str
    """``flexgen/<organization>/<model>`` or ``flexgen//<absolute path>``, with ``@<variant>`` for a compressed one."""
    suite: Suite
    output_path: Path
    """HELM's ``--output-path``."""
    max_eval_instances: int
    """Most instances of each run entry."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """``client_spec.args`` of the deployment; what its name says (`SAID_BY_NAME`) is not written where it is all."""
    workers: Workers | None = None
    """Several workers; None: the process of ``helm-run`` alone."""

    @property
    def suite_folder(self) -> Path:
        """Folder to which HELM writes the results."""
        return self.output_path / "runs" / self.suite.name

    @property
    def local_path(self) -> Path:
        """Folder of HELM's configuration and request cache."""
        return self.output_path / "prod_env"

    @property
    def log_folder(self) -> Path:
        """Folder of the logs of HELM's commands."""
        return self.output_path / "logs"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the engine that the deployment's name does not say."""
        return {name: value for name, value in self.arguments.items() if name not in SAID_BY_NAME}

    def new_log(self) -> Path:
        """Name a file for what HELM's commands print now."""
        return self.log_folder / f"{self.suite.name}-{time.strftime('%Y%m%d-%H%M%S')}.log"


def run_command(evaluation: Evaluation) -> list[str]:
    """Return the ``helm-run`` command."""
    return [
        "helm-run",
        *("--conf-paths", str(evaluation.suite.run_entries)),
        *("--models-to-run", evaluation.deployment),
        *("--suite", evaluation.suite.name),
        *("--max-eval-instances", str(evaluation.max_eval_instances)),
        *("--output-path", str(evaluation.output_path)),
        *("--local-path", str(evaluation.local_path)),
        *("--runner-class-name", RUNNER if evaluation.workers is None else WORKERS_RUNNER),
    ]


def summarize_command(evaluation: Evaluation) -> list[str]:
    """Return the ``helm-summarize`` command."""
    schema = evaluation.suite.schema
    return [
        "helm-summarize",
        *("--suite", evaluation.suite.name),
        *("--output-path", str(evaluation.output_path)),
        *("--local-path", str(evaluation.local_path)),
        *(("--schema-path", str(schema)) if schema else ("--auto-generate-schema",)),
        *("--summarizer-class-name", SUMMARIZER),
        # A schema lists what is shown, not all that HELM measures.
        *("--schema-validation", "off"),
        # In several threads, templates meet a race of CPython 3.11 (python/cpython#106905), a SystemError now and then.
        *("--num-threads", "1"),
    ]


def server_command(evaluation: Evaluation) -> list[str]:
    """Return the ``helm-server`` command that shows the results in a browser."""
    return ["helm-server", "--suite", evaluation.suite.name, "--output-path", str(evaluation.output_path)]


def settings(evaluation: Evaluation) -> dict[str, str]:
    """Return the environment variables without which a printed ``helm-run`` command would do something else."""
    return {} if evaluation.workers is None else evaluation.workers.variables


def environment(evaluation: Evaluation) -> dict[str, str]:
    """Return the environment for HELM.

    The data of a suite of this package is here before HELM runs, so nothing waits for a network: neither the model hub
    nor nltk (`nltk_data`).
    """
    variables = {**os.environ, **settings(evaluation)}
    if not evaluation.suite.packaged:
        return variables
    offline = {"HF_HUB_OFFLINE": "1"} if evaluation.deployment.startswith("flexgen//") else {}
    return {**variables, **offline, "NLTK_DATA": str(nltk_data(evaluation))}


def nltk_data(evaluation: Evaluation) -> Path:
    """Make a folder of nltk data with which HELM does not download nltk's sentence splitter.

    HELM leaves that out if it finds a folder of its name, and no metric of this package's suites uses it.
    """
    folder = evaluation.local_path.absolute() / "nltk_data"
    (folder / "tokenizers" / "punkt_tab").mkdir(parents=True, exist_ok=True)
    return folder
