"""What reads files: each subject knows its files, and what is right where they are whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
from helm.common.cache_backend_config import SqliteCacheBackendConfig
from helm.common.request import Request

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.helm.console import Console
from flexgen_helm.helm.deployment import CLIENT
from flexgen_helm.helm.journal import Journal
from flexgen_helm.helm.registry import ENGINES
from flexgen_helm.helm.workload import EngineServer, Served, serve
from flexgen_helm.runs.fault_matrix.outcomes import Verdict

ROWS: dict[str, Any] = {"gpu_batch_size": 16, "gpu_batch_tokens": 64}
JOBS = [
    Job(prompt="The quick brown fox", max_new_tokens=6, top_logprobs=3),
    Job(prompt="Question: Größe 中文 😀?\nAnswer:", max_new_tokens=6, temperature=1.0, num_completions=2),
    Job(prompt="0 1 2 3 4 5 6 7 8 9 " * 12, score_prompt=True),
]
REQUESTS = [
    *(Request(prompt=f"{number} foxes", max_tokens=5, temperature=number % 2) for number in range(8)),
    *(Request(prompt=f"{number} dogs", max_tokens=0, echo_prompt=True) for number in range(4)),
]
RUNS, OTHER_RUNS = ["one", "two"], ["three"]


class Subject(Protocol):
    """Something that reads files."""

    mends: bool
    """Whether a refused file may be deleted, because it is made again."""

    def make(self, folder: Path) -> None:
        """Make the files, whole, in an empty folder."""
        ...

    def files(self, folder: Path) -> Sequence[Path]:
        """Return the files that may be damaged."""
        ...

    def read(self, folder: Path) -> tuple[Verdict, str]:
        """Read them.

        Returns:
            "answered", "recomputed", "another" or "wrong", and what is wrong.

        Raises:
            FlexGenError: They are refused.
        """
        ...


class Answers:
    """Answers that were kept: in the journal, or in HELM's cache."""

    mends = True

    def __init__(self, model: Path, kept: str) -> None:
        """Args: model: The model's folder. kept: "journal" or "cache"."""
        self._kept = kept
        arguments = {"name_or_path": str(model), "policy": ROWS}
        self._deployment = ModelDeployment("flexgen/fault/files", ClientSpec(CLIENT, arguments))
        register_model_deployment(self._deployment)
        self._right: list[Any] = []

    def make(self, folder: Path) -> None:
        """Make the files."""
        with Journal(folder / "journal", OTHER_RUNS) as journal:
            self.serve(folder, journal, REQUESTS[:2])
        (folder / "cache").rename(folder / "cache_of_others")
        with Journal(folder / "journal", RUNS) as journal:
            self.serve(folder, journal, REQUESTS)
        if self._kept == "journal":
            shutil.rmtree(folder / "cache")
        else:
            shutil.rmtree(folder / "journal")

    def files(self, folder: Path) -> Sequence[Path]:
        """Return the files that may be damaged."""
        return sorted((folder / self._kept).glob("*.*"))

    def read(self, folder: Path) -> tuple[Verdict, str]:
        """Read them; see `Subject`."""
        self._right = self._right or self._fresh(folder.with_name("fresh"))
        with Journal(folder / "journal", RUNS) as journal:
            served = self.serve(folder, journal, REQUESTS)
            journal.discard()
        given = [result.completions for result in served.results]
        if given != self._right:
            return "wrong", next(f"{one} is not {other}" for one, other in zip(given, self._right, strict=True) if one != other)
        return ("recomputed" if "computed" in served.sources else "answered"), ""

    def _fresh(self, folder: Path) -> list[Any]:
        shutil.rmtree(folder, ignore_errors=True)
        with Journal(folder / "journal", RUNS) as journal:
            return [result.completions for result in self.serve(folder, journal, REQUESTS).results]

    def serve(self, folder: Path, journal: Journal, requests: Sequence[Request]) -> Served:
        """Serve requests, with a cache in a folder."""
        (folder / "cache").mkdir(parents=True, exist_ok=True)
        console = Console(None)
        config = SqliteCacheBackendConfig(str(folder / "cache")).get_cache_config("flexgen")
        try:
            return serve(
                self._deployment,
                requests,
                ENGINES.caches.get(config),
                journal,
                EngineServer(ENGINES, journal, console),
                console,
            )
        finally:
            ENGINES.caches.close()


class Engines:
    """Files from which engines are made: those of the model, or those that were made of them."""

    def __init__(self, model: Path, names: Sequence[str], *, mends: bool, without: Sequence[str] = (), **options: Any) -> None:
        """Describe the files.

        Args:
            model: The model's folder.
            names: Patterns of the files, from the folder of a case on.
            mends: See `Subject`.
            without: Patterns of what a killed process has not made yet.
            options: Keywords of ``Engine.from_pretrained``.
        """
        self.mends = mends
        self._model, self._names, self._without, self._options = model, names, without, options
        self._right: tuple[Any, list[Any]] | None = None

    def make(self, folder: Path) -> None:
        """Make the files."""
        shutil.copytree(self._model, folder / "model")
        self._answers(folder)
        for pattern in self._without:
            for path in folder.glob(pattern):
                path.unlink()

    def files(self, folder: Path) -> Sequence[Path]:
        """Return the files that may be damaged."""
        return sorted({path for pattern in self._names for path in folder.glob(pattern) if path.is_file()})

    def read(self, folder: Path) -> tuple[Verdict, str]:
        """Read them; see `Subject`."""
        if self._right is None:
            whole = folder.with_name("whole")
            shutil.rmtree(whole, ignore_errors=True)
            self.make(whole)
            self._right = self._answers(whole)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        numerics, answers = self._answers(folder)
        if numerics != self._right[0]:
            return "another", ""
        if answers != self._right[1]:
            return "wrong", f"{answers!r:.500}"
        changed = {path for path in folder.rglob("*") if path.is_file() and path.stat().st_mtime_ns != before.get(path)}
        return ("recomputed" if changed else "answered"), ""

    def _answers(self, folder: Path) -> tuple[Any, list[Any]]:
        options = {"policy": Policy(**ROWS), **self._options}
        with Engine.from_pretrained(str(folder / "model"), offload_folder=folder / "offload", **options) as engine:
            results = engine.run(JOBS, on_error="return", progress=False)
            for result in results:
                if result.error is not None:
                    raise result.error
            return engine.numerics, [(each.completions, each.prompt_logprobs) for each in results]


class Records:
    """What this package notes of engines, self-checks, digests and products in its cache folder."""

    mends = True
    VARIABLE = "FLEXGEN_HELM_CACHE"

    def __init__(self, model: Path) -> None:
        """Args: model: The model's folder."""
        self._served = Answers(model, "journal")
        self._right: Any = None

    def make(self, folder: Path) -> None:
        """Make the files."""
        with _variable(self.VARIABLE, folder / "notes"):
            ENGINES.close()
            self._served.make(folder)

    def files(self, folder: Path) -> Sequence[Path]:
        """Return the files that may be damaged."""
        return sorted(path for path in (folder / "notes").rglob("*.json"))

    def read(self, folder: Path) -> tuple[Verdict, str]:
        """Read them; see `Subject`."""
        self._right = self._right or self._read_whole(folder)
        before = {path: path.read_bytes() for path in self.files(folder) if path.is_file()}
        info, answers = self._read(folder)
        if answers != self._right[1]:
            return "wrong", "answers"
        if info != self._right[0]:
            other = info.numerics != self._right[0].numerics
            return ("another", "") if other else ("wrong", f"an engine that describes itself as {info}")
        after = {path: path.read_bytes() for path in self.files(folder) if path.is_file()}
        return ("recomputed" if after != before else "answered"), ""

    def _read_whole(self, folder: Path) -> tuple[Any, list[Any]]:
        """Read what is not damaged: the library of the products, which is part of the numerics, is noted in it."""
        whole = folder.with_name("whole")
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(folder.with_name("pristine"), whole)
        return self._read(whole)

    def _read(self, folder: Path) -> tuple[Any, list[Any]]:
        """Let an engine be recalled or loaded, whatever the answers that are kept."""
        with _variable(self.VARIABLE, folder / "notes"):
            found = []
            for kept in (True, False):
                ENGINES.close()
                if not kept:
                    shutil.rmtree(folder / "journal", ignore_errors=True)
                with Journal(folder / "journal", RUNS) as journal:
                    served = self._served.serve(folder, journal, REQUESTS)
                info = replace(served.report.engine, cache_bytes={})  # what the machine has free when an engine is loaded
                found.append((info, [result.completions for result in served.results]))
                shutil.rmtree(folder / "cache")
        assert found[0][1] == found[1][1], f"{found[0][1]} is not {found[1][1]}"
        return found[0]


@contextmanager
def _variable(name: str, value: Path) -> Iterator[None]:
    """Let an environment variable have another value."""
    before = os.environ.get(name)
    os.environ[name] = str(value)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
