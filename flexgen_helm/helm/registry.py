"""The one engine that a process holds, behind a lock."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.helm.deployment import EngineArguments
from flexgen_helm.helm.known import remember
from flexgen_helm.helm.response_cache import ResponseCaches
from flexgen_helm.types import Job

if TYPE_CHECKING:
    from flexgen_helm.runtime.engine import Engine


def load_engine(arguments: EngineArguments, *, few_requests: bool, workload: Sequence[Job] | None = None) -> Engine:
    """Load an engine.

    Args:
        arguments: Keywords of ``Engine.from_pretrained``.
        few_requests: Whether rows are small unless the policy names their sizes, because what is missing in a row is
            computed as padding.
        workload: Jobs that it will run; None: unknown.

    Raises:
        FlexGenError: The engine cannot be made; see ``Engine.from_pretrained``.
    """
    from flexgen_helm.memory.device import resolve_device
    from flexgen_helm.policy.row_sizes import with_row_sizes
    from flexgen_helm.runtime.engine import Engine

    if few_requests:
        device = resolve_device(arguments.get("device", "auto"))
        arguments = {**arguments, "policy": with_row_sizes(arguments.get("policy"), device, few_requests=True)}
    if workload is not None:
        arguments = {**arguments, "workload": workload}
    with messages_in_helms_log():
        return Engine.from_pretrained(**arguments)


@contextmanager
def messages_in_helms_log(name: str = "flexgen_helm") -> Iterator[None]:
    """Show what a logger of this package says; helm-run configures HELM's own only."""
    ours, helms = logging.getLogger(name), logging.getLogger("helm")
    level, handlers = ours.level, [handler for handler in helms.handlers if handler not in ours.handlers]
    ours.setLevel(helms.getEffectiveLevel())
    for handler in handlers:
        ours.addHandler(handler)
    try:
        yield
    finally:
        ours.setLevel(level)
        for handler in handlers:
            ours.removeHandler(handler)


class EngineRegistry:
    """Lends the engine of a deployment, loading it first where needed.

    HELM makes a client per thread when several threads ask for one deployment at once, and keeps every client for the
    rest of the process. Weights must be loaded once and freed when another model is due, so they live here.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._engine: Engine | None = None
        self._arguments: EngineArguments | None = None
        self._refused: tuple[EngineArguments, UnsupportedModel] | None = None
        self._borrowers = 0
        self.caches = ResponseCaches()
        """HELM's request caches, open for as long as the process needs them."""
        self.evaluating = threading.RLock()
        """Held while HELM runs a suite in this process, because HELM's registries and folders are those of the process."""

    @property
    def borrowers(self) -> int:
        """Number of leases that are open, one for each request in flight."""
        return self._borrowers

    @contextmanager
    def lease(
        self,
        arguments: EngineArguments,
        *,
        few_requests: bool = False,
        workload: Sequence[Job] | None = None,
        on_load: Callable[[], None] | None = None,
    ) -> Iterator[Engine]:
        """Lend the engine of a deployment; it is not closed before the lease ends.

        If another deployment's engine is loaded, waits until nobody uses it and closes it first.

        Args:
            arguments: The deployment, as keywords of ``Engine.from_pretrained``.
            few_requests: See ``load_engine``; an engine that is loaded already is lent as it is.
            workload: See ``load_engine``.
            on_load: Called before the engine is loaded, if that is necessary.

        Raises:
            FlexGenError: The engine cannot be made.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._borrowers or self._arguments == arguments)
            if self._engine is None or self._arguments != arguments:
                if on_load is not None:
                    on_load()
                self._replace(arguments, few_requests, workload)
            engine = self._engine
            assert engine is not None
            self._borrowers += 1
        try:
            yield engine
        finally:
            with self._changed:
                self._borrowers -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Close the loaded engine, if any, once nobody uses it, and the caches; forget what was refused."""
        with self._changed:
            self._changed.wait_for(lambda: not self._borrowers)
            self._close()
            self._refused = None
            self.caches.close()

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._arguments = None

    def _replace(self, arguments: EngineArguments, few_requests: bool, workload: Sequence[Job] | None) -> None:
        # Requests of one run ask from several threads; each would load the whole model again to see it refused.
        if self._refused is not None and self._refused[0] == arguments:
            raise self._refused[1]
        self._close()
        try:
            self._engine = load_engine(arguments, few_requests=few_requests, workload=workload)
        except UnsupportedModel as error:
            self._refused = (arguments, error)
            raise
        self._arguments = arguments
        if not few_requests:
            remember(arguments, self._engine.describe())


ENGINES = EngineRegistry()
"""The registry of this process."""
