"""How many workers a command has, and where: options of `flexgen-helm eval`, environment variables of `helm-run`. No Ray."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from flexgen_helm.errors import FlexGenError

RUNNER = "flexgen_helm.workers.runner.RayRunner"
"""What ``helm-run --runner-class-name`` is given."""
COUNT, GPUS, ADDRESS = "FLEXGEN_HELM_WORKERS", "FLEXGEN_HELM_GPUS_PER_WORKER", "RAY_ADDRESS"
"""Environment variables; the last one is Ray's own."""
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Workers:
    """The workers that a user asks for."""

    count: int
    gpus: float | None = None
    """GPUs of each; None: one, where the cluster has any and the deployment may use them."""
    address: str | None = None
    """``host:port`` of a Ray cluster, or ``auto`` for the one on this machine; None: one is started for the command."""

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that say the same."""
        named = {COUNT: self.count, GPUS: self.gpus, ADDRESS: self.address}
        return {
            name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in named.items() if value is not None
        }

    @classmethod
    def named_by(cls, variables: Mapping[str, str]) -> Workers:
        """Read the environment variables.

        Raises:
            FlexGenError: They do not name a number of workers and GPUs.
        """
        count, gpus = variables.get(COUNT, ""), variables.get(GPUS, "")
        try:
            workers = cls(int(count), float(gpus) if gpus else None, variables.get(ADDRESS) or None)
        except ValueError:
            raise FlexGenError(
                f"{COUNT} is {count!r} and {GPUS} is {gpus!r}, but they are numbers. Give {COUNT}=2 for two workers, and "
                f"{GPUS}=1 or leave it out."
            ) from None
        if workers.count < 1 or not (workers.gpus or 0) >= 0:
            raise FlexGenError(
                f"{COUNT}={count} {GPUS}={gpus} are no numbers of workers and GPUs. Give 1 or more, and 0 or more."
            )
        return workers

    def check(self) -> None:
        """Find what would end the command before it has begun.

        Raises:
            FlexGenError: Ray is not installed, or nothing listens at the address.
        """
        if importlib.util.find_spec("ray") is None:
            raise FlexGenError(
                'Several workers need Ray, which is not installed. Install it with `pip install "flexgen_helm[ray]"`.'
            )
        if self.address is None or self.address == "auto":
            return
        host, colon, port = self.address.rpartition(":")
        if not colon or not port.isdecimal() or "/" in host:
            raise FlexGenError(
                f"`{self.address}` is no address of a Ray cluster. Give `host:port` as `ray start --head` prints it, `auto` "
                "for the cluster that this machine belongs to, or leave it out: then one is started here for the command."
            )
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise no_cluster(self.address, error) from error


def no_cluster(address: str, reason: object) -> FlexGenError:
    """Return the error for an address at which there is no cluster."""
    return FlexGenError(
        f"There is no Ray cluster at {address} ({reason}). Start one with `ray start --head --port 6379`, join it on the other "
        "hosts with `ray start --address HOST:6379`, and run this command on one of them."
    )
