"""An engine for a harness: made of the texts that a command line has, when its first jobs are known."""

from __future__ import annotations

import difflib
import inspect
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from flexgen_helm.compression.config import resolve
from flexgen_helm.errors import FlexGenError
from flexgen_helm.loading.source import open_model
from flexgen_helm.memory.device import resolve_device
from flexgen_helm.options import parse_max_memory, parse_policy
from flexgen_helm.runtime.engine import Engine
from flexgen_helm.types import Job, Policy

NOT_FOR_HARNESSES = ("workload", "free_shapes", "dummy_weights")
"""Options of `Engine.from_pretrained` that a harness cannot give: one is its requests, two are for benchmarks."""


class LateEngine:
    """Tokenizer and context of a model at once; the engine itself at the first jobs, for which a policy is then searched."""

    def __init__(self, name_or_path: str, **options: Any) -> None:
        """Read config and tokenizer; the weights are not read yet.

        Args:
            name_or_path: A model folder or a name on the model hub, with `@w4` and the like for a compressed variant.
            options: Options of `Engine.from_pretrained`; ``policy`` and ``max_memory`` also as text or as a mapping.

        Raises:
            FlexGenError: If there is no such option or model, or the model is refused, or has no tokenizer.
        """
        self._options = {"name_or_path": name_or_path} | engine_options(options)
        name, _ = resolve(name_or_path, self._options.get("compression"))
        device = resolve_device(self._options.get("device", "auto")).torch_device
        dtype, revision = self._options.get("dtype", "auto"), self._options.get("revision")
        source = open_model(name, dtype=dtype, device=device, revision=revision)
        known = source.described(source.empty)
        if known.tokenizer is None:
            raise FlexGenError(
                f"{name} has no tokenizer, but a harness sends texts. Add the tokenizer's files to the model folder."
            )
        self.tokenizer: PreTrainedTokenizerBase = known.tokenizer
        self.max_length = known.max_length
        """Context in tokens: input and new tokens together."""
        self.loaded: Engine | None = None
        """The engine; None: no jobs came yet, or it was closed."""
        self._lock = threading.Lock()

    def get(self, workload: Sequence[Job] | None = None) -> Engine:
        """Return the engine, which the first call makes. May be called from any thread.

        Args:
            workload: The jobs that it will run, if they are known.

        Raises:
            FlexGenError: If the engine cannot be made; see `Engine.from_pretrained`.
        """
        with self._lock:
            if self.loaded is None:
                self.loaded = Engine.from_pretrained(**self._options, workload=workload)
            return self.loaded

    def close(self) -> None:
        """Close the engine. The next jobs make a new one."""
        with self._lock:
            if self.loaded is not None:
                self.loaded.close()
            self.loaded = None


def engine_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check options that a harness passes on, and build the objects that its command line cannot hold.

    Args:
        given: Options of `Engine.from_pretrained` by name; those that are None are left out.

    Raises:
        FlexGenError: If there is no such option; the message suggests the most similar one and lists all.
        PolicyError: If a policy or a memory limit cannot be read.
    """
    known = [name for name in inspect.signature(Engine.from_pretrained).parameters if name not in NOT_FOR_HARNESSES]
    for name in given:
        if name not in known or name == "name_or_path":
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {similar[0]!r}?" if similar else ""
            listed = ", ".join(other for other in known if other != "name_or_path")
            raise FlexGenError(f"The model of flexgen has no option {name!r}.{hint} Its options are {listed}.")
    options = {name: value for name, value in given.items() if value is not None}
    policy, limits = options.get("policy"), options.get("max_memory")
    if policy is not None and not isinstance(policy, Policy):
        options["policy"] = parse_policy(policy if isinstance(policy, str) else json.dumps(policy))
    if isinstance(limits, str):
        options["max_memory"] = parse_max_memory(limits)
    return options
