"""The suite that is killed, and the process that is it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from flexgen_helm.helm.deployment import CLIENT, RUNNER

SUITE = "kill_test"
DEPLOYMENT = "flexgen/kill/test"
CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo"}
NUM_TRAIN = 3
LETTERS, SENTENCES, MORE_TOKENS = "questions.jsonl", "sentences.jsonl", 7
"""Files of equal questions, of which the first are answered by a letter and the others by more tokens."""
PRELOADED = "flexgen_helm.runs.kill_test.preloaded"
"""Module that the process has imported from which commands are forked."""


@dataclass(frozen=True)
class Command:
    """One ``helm-run`` command; the same one continues what was killed."""

    model_folder: Path
    output_path: Path
    max_eval_instances: int
    disable_cache: bool
    engine: Mapping[str, Any] = field(default_factory=dict)
    """More keywords of ``Engine.from_pretrained``, as a deployment has them."""
    log_folder: Path | None = None
    """For what the command prints and computes; None: with the output."""

    @property
    def suite_folder(self) -> Path:
        """Folder to which HELM writes the runs."""
        return self.output_path / "runs" / SUITE

    def arguments(self) -> list[str]:
        """Return the arguments of ``helm-run``: scoring, greedy generation and samples, from data made by hand."""
        entries = [
            f"{_mcqa(LETTERS)},method=multiple_choice_joint",
            f"{_mcqa(SENTENCES)},method=multiple_choice_joint,increase_max_tokens={MORE_TOKENS}",
            f"{_mcqa(LETTERS)},method=multiple_choice_separate_calibrated",
            "wikifact:k=5,subject=capital",
        ]
        model = DEPLOYMENT if self.engine else f"flexgen/{self.model_folder.absolute()}"
        return [
            *("--run-entries", *(f"{entry},model={model}" for entry in entries)),
            *("--suite", SUITE),
            *("--max-eval-instances", str(self.max_eval_instances)),
            *("--output-path", str(self.output_path)),
            *("--local-path", str(self.output_path / "local")),
            *("--runner-class-name", RUNNER),
            *(("--disable-cache",) if self.disable_cache else ()),
        ]

    def start(self, target: Callable[[list[str], Path, Path], None] | None = None) -> BaseProcess:
        """Start the command in a process of its own, in which the slow imports are done already.

        Args:
            target: Called there in the place of `helm_run`, with its arguments.
        """
        self.write_files()
        self.computed.unlink(missing_ok=True)
        process = forking().Process(target=target or helm_run, args=(self.arguments(), self.log, self.computed))
        process.start()
        return process

    @property
    def computed(self) -> Path:
        """File of the keys of all answers that the last process has computed, written before they can be durable."""
        return (self.log_folder or self.output_path) / "computed.txt"

    @property
    def log(self) -> Path:
        """File to which everything is appended that the command prints."""
        return (self.log_folder or self.output_path) / "log.txt"

    def write_files(self) -> None:
        """Write what the command reads."""
        self._write_data()
        self._write_deployment()

    def _write_deployment(self) -> None:
        arguments = {"name_or_path": str(self.model_folder.absolute()), **self.engine}
        deployment = {"name": DEPLOYMENT, "client_spec": {"class_name": CLIENT, "args": arguments}}
        path = self.output_path / "local" / "model_deployments.yaml"
        path.write_text(json.dumps({"model_deployments": [deployment]}))  # which is YAML too

    def _write_data(self) -> None:
        scenarios = self.output_path / "scenarios"
        wikifact, mcqa = scenarios / "wikifact" / "data", scenarios / "custom_mcqa"
        for folder in (wikifact, mcqa, self.output_path / "local"):
            folder.mkdir(parents=True, exist_ok=True)
        facts = [
            json.dumps({"property": "P36", "template": f"The capital of {country} is", "result_names": [[city]]})
            for country, city in CAPITALS.items()
        ]
        for split, chosen in (("train", facts[:NUM_TRAIN]), ("dev", facts[-1:]), ("test", facts[NUM_TRAIN:])):
            (wikifact / f"{split}.jsonl").write_text("\n".join(chosen) + "\n")
        for name in (LETTERS, SENTENCES):
            (mcqa / name).write_text(_questions())


def forking() -> ForkServerContext:
    """Return what starts processes in which `PRELOADED` is imported already."""
    context = get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


def _mcqa(path: str) -> str:
    return f"custom_mcqa:path={path},num_train_instances={NUM_TRAIN}"


def _questions() -> str:
    from helm.benchmark.scenarios.scenario import CORRECT_TAG, TEST_SPLIT, TRAIN_SPLIT, Input, Instance, Output, Reference
    from helm.common.codec import to_jsonl

    cities, instances = list(CAPITALS.values()), []
    for number, (country, city) in enumerate(CAPITALS.items()):
        references = [Reference(Output(city), [CORRECT_TAG]), *(Reference(Output(cities[number - i]), []) for i in (1, 2))]
        split = TRAIN_SPLIT if number < NUM_TRAIN else TEST_SPLIT
        instances.append(Instance(Input(f"What is the capital of {country}?"), references, split))
    return str(to_jsonl(instances))


def helm_run(arguments: list[str], log: Path, computed: Path) -> None:
    """Be ``helm-run`` in this process, and write down what is computed before it can be durable."""
    from helm.benchmark import run

    from flexgen_helm.helm.journal import Journal
    from flexgen_helm.runs.kill_test import preloaded

    keys, append = os.open(computed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), Journal.append

    def watched(journal: Journal, key: str, response: Any) -> None:
        os.write(keys, hashlib.sha256(key.encode()).hexdigest().encode() + b"\n")
        append(journal, key, response)

    run.register_builtin_configs_from_helm_package = preloaded.prepare  # type: ignore[attr-defined]  # which is done
    Journal.append = watched  # type: ignore[method-assign, assignment]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["helm-run", *arguments]
    try:
        run.main()
    except Exception:
        sys.excepthook(*sys.exc_info())  # as where this is no child of another process
        sys.exit(1)
