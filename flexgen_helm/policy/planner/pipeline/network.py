"""Network between the stages of a pipeline. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from flexgen_helm.errors import PolicyError

RATES: Mapping[str, float] = {
    **{f"{prefix}BIT/S": factor / 8 for prefix, factor in (("K", 1e3), ("M", 1e6), ("G", 1e9))},
    **{f"{prefix}B/S": factor for prefix, factor in (("K", 1e3), ("M", 1e6), ("G", 1e9))},
}
"""Bytes per second of each unit."""
TIMES: Mapping[str, float] = {"US": 1e-6, "MS": 1e-3, "S": 1.0}
AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Z/]+)\s*")


@dataclass(frozen=True)
class Network:
    """What lies between two stages that follow each other. Both directions work at once.

    Attributes:
        rate: Bytes per second, of each direction of each stage's connection.
        latency: Seconds from the end of a transfer at the sender to its end at the receiver.
    """

    rate: float = math.inf
    latency: float = 0.0

    def seconds(self, num_bytes: float) -> float:
        """Return the time in which so many bytes leave the sender."""
        return num_bytes / self.rate

    def __str__(self) -> str:
        """Return it in the form that `parse_network` reads."""
        return f"{8 * self.rate / 1e9:.4g}Gbit/s,{1e3 * self.latency:.4g}ms"


NO_NETWORK = Network()
"""A network that takes no time."""


def parse_network(text: str) -> Network:
    """Return the network for a text such as ``1Gbit/s,10ms`` or ``125MB/s,0ms``.

    Raises:
        PolicyError: If it has another form.
    """
    parts = [AMOUNT.fullmatch(part.upper()) for part in text.split(",")]
    known = [part for part in parts if part is not None]
    if len(parts) == len(known) == 2:
        (rate, rate_unit), (latency, latency_unit) = (part.groups() for part in known)
        if rate_unit in RATES and latency_unit in TIMES and float(rate) > 0:
            return Network(float(rate) * RATES[rate_unit], float(latency) * TIMES[latency_unit])
    raise PolicyError(
        f"The network {text!r} cannot be read. Give its rate and its latency, such as 1Gbit/s,10ms: bit/s or B/s "
        "with K, M or G, and s, ms or us."
    )
