"""HELM's commands as calls in this process: their log in a file, progress on the screen, nothing of theirs left behind.

What HELM prints, by whatever means, goes to the log while a command runs. Its logger and nltk's folders are
afterwards as they were. Registries of models keep what was registered; the next command registers its own over it.
"""

from __future__ import annotations

import importlib
import io
import logging
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from helm.benchmark.config_registry import register_builtin_configs_from_helm_package, register_configs_from_directory
from helm.benchmark.executor import ExecutionSpec
from helm.benchmark.model_metadata_registry import get_all_models
from helm.benchmark.presentation.run_entry import read_run_entries
from helm.benchmark.run import build_parser, load_entry_point_plugins, run_entries_to_run_specs
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import set_benchmark_output_path
from helm.common.authentication import Authentication
from helm.common.cache_backend_config import SqliteCacheBackendConfig
from helm.common.hierarchical_logger import hlog
from helm.proxy.services.service import CACHE_DIR

from flexgen_helm.evaluation.commands import Evaluation, nltk_data, run_command
from flexgen_helm.evaluation.summarizer import FlexGenSummarizer
from flexgen_helm.helm.console import Console
from flexgen_helm.helm.registry import ENGINES
from flexgen_helm.helm.runner import FlexGenRunner
from flexgen_helm.plugin import complete_written_deployments, make_model_deployment

BUILT_IN = "simple/model1"
"""A model of HELM's own configuration, which takes seconds to read and is read once."""
FORMAT = "%(asctime)s %(levelname)-8s %(message)s"


def execute_here(command: list[str], evaluation: Evaluation, log: Path, *, console: Console) -> int:
    """Run a command of HELM in this process, within `logged`, and return the exit status that it would have.

    After an error the engine is closed, because nobody knows in which state it is.

    Args:
        command: What is run: ``helm-run`` or ``helm-summarize``, as `flexgen_helm.evaluation.commands` writes it.
        evaluation: What it is made of.
        log: Gets the traceback of an error.
        console: Shows steps and their progress.

    Raises:
        KeyboardInterrupt: Finished answers are kept.
    """
    try:
        if command[0] == "helm-run":
            runner, run_specs = runner_of(evaluation, console)
            if run_specs:
                runner.run_here(run_specs)
        else:
            _summarize(evaluation)
    except KeyboardInterrupt:
        ENGINES.close()
        raise
    except (Exception, SystemExit):  # HELM must not end this process
        ENGINES.close()
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        return 1
    return 0


def runner_of(evaluation: Evaluation, console: Console) -> tuple[FlexGenRunner, list[RunSpec]]:
    """Return the runner of an evaluation and what it is to run, made as ``helm-run`` makes them; call it within `logged`."""
    arguments: Namespace = build_parser().parse_args(run_command(evaluation)[1:])
    register(evaluation)
    Path(arguments.output_path).mkdir(parents=True, exist_ok=True)
    set_benchmark_output_path(arguments.output_path)
    entries = read_run_entries(arguments.conf_paths).entries
    run_specs = run_entries_to_run_specs(
        entries, max_eval_instances=arguments.max_eval_instances, models_to_run=arguments.models_to_run
    )
    hlog(f"{len(entries)} entries produced {len(run_specs)} run specs")
    cache = Path(arguments.local_path) / CACHE_DIR
    cache.mkdir(parents=True, exist_ok=True)
    spec = ExecutionSpec(
        auth=Authentication(""),
        url=None,
        local_path=arguments.local_path,
        parallelism=arguments.num_threads,
        sqlite_cache_backend_config=SqliteCacheBackendConfig(str(cache)),
    )
    flags = ("skip_instances", "cache_instances", "cache_instances_only", "skip_completed_runs", "exit_on_error")
    runner = FlexGenRunner(spec, arguments.output_path, arguments.suite, **{flag: getattr(arguments, flag) for flag in flags})
    runner.console = console
    return runner, run_specs


def register(evaluation: Evaluation) -> None:
    """Make HELM know the model, its deployment as it is now, and the plugins."""
    if BUILT_IN not in get_all_models():
        register_builtin_configs_from_helm_package()
    register_configs_from_directory(str(evaluation.local_path))
    load_entry_point_plugins()
    complete_written_deployments()
    if not evaluation.options:
        make_model_deployment(evaluation.deployment)  # an earlier call may have registered one of this name with options


def _summarize(evaluation: Evaluation) -> None:
    """Do what the ``helm-summarize`` command of `summarize_command` does."""
    register(evaluation)
    schema = evaluation.suite.schema
    FlexGenSummarizer(
        release=None,
        suites=None,
        suite=evaluation.suite.name,
        schema_path=str(schema) if schema else None,
        output_path=str(evaluation.output_path),
        verbose=False,
        num_threads=1,
        allow_unknown_models=True,
        schema_validation="off",
    ).run_pipeline(skip_completed=False)


@contextmanager
def logged(log: Path, evaluation: Evaluation, *, verbose: bool) -> Iterator[None]:
    """Let what this process prints go to a file, and keep HELM from leaving anything behind. One thread at a time may.

    Args:
        log: The file, to which is appended.
        evaluation: What is run.
        verbose: Whether it is shown as well.
    """
    with ExitStack() as stack:
        stack.enter_context(ENGINES.evaluating)
        file = stack.enter_context(log.open("a", encoding="utf-8", errors="replace", buffering=1))
        out, err = _Diverted(sys.stdout, file, also=verbose), _Diverted(sys.stderr, file, also=verbose)
        stack.callback(out.release)
        stack.callback(err.release)
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        stack.enter_context(_loggers(out))
        stack.enter_context(_searched_by_nltk(evaluation))
        yield


class _Diverted(io.TextIOBase):
    """A standard stream whose text goes to a file. Libraries that keep it find the stream itself in it afterwards."""

    def __init__(self, stream: TextIO, file: TextIO, *, also: bool) -> None:
        """Args: stream: The stream. file: Gets the text. also: Whether the stream gets it as well."""
        self._stream, self._file, self._also = stream, file, also
        self._released = False

    def release(self) -> None:
        """Be the stream again."""
        self._released = True

    def write(self, text: str) -> int:
        if not self._released:
            self._file.write(text)
        if self._released or self._also:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self._released or self._also:
            self._stream.flush()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._released and self._stream.isatty()


@contextmanager
def _loggers(stream: TextIO | io.TextIOBase) -> Iterator[None]:
    """Let HELM's logger and the root logger, to which some libraries add handlers, write to a stream alone."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(FORMAT))
    helms, root = logging.getLogger("helm"), logging.getLogger()
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in (helms, root)]
    helms.handlers, root.handlers, helms.propagate = [handler], [handler], False
    helms.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, handlers, level, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


@contextmanager
def _searched_by_nltk(evaluation: Evaluation) -> Iterator[None]:
    """Keep nltk from downloading what no metric of this package's suites uses, as `environment` does for a process."""
    if not evaluation.suite.packaged:
        yield
        return
    folder, folders = str(nltk_data(evaluation)), importlib.import_module("nltk").data.path
    folders.insert(0, folder)
    try:
        yield
    finally:
        folders.remove(folder)
