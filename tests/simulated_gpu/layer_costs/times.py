"""The time that counts take on a GPU, from rates that were measured on one."""

from __future__ import annotations

from typing import NamedTuple

from tests.simulated_gpu.gpu import Size
from tests.simulated_gpu.layer_costs.counting import operations
from tests.simulated_gpu.layer_costs.rows import Cost

# Facts measured on an H100.
MEMORY_RATE = 2.98e12
"""Bytes a second that kernels read and write."""
HALF_RATE, FLOAT_RATE = 600e12, 45e12
"""Floating-point operations a second of products, in 16 bits and in fp32."""
LAUNCH_SECONDS = 2e-6
"""Of a kernel on the GPU, whatever it does."""
LINK_RATE = 54.9e9
"""Bytes a second between pinned host memory and the GPU, in each direction."""
PYTHON_SECONDS = 12e-6
"""Of Python and torch for a launch or a copy."""
GOALS = {"OPT-30B": 26.4e-3}
"""Seconds of a layer that a model is to take."""


class Times(NamedTuple):
    """Seconds of a row in a layer. Attention on the CPU is not among them.

    Attributes:
        python: Of the host that launches.
        device: Of the kernels, one after the other.
        link: Of the direction with more bytes, the layer's weights included.
    """

    python: float
    device: float
    link: float

    def layer(self, waits: int) -> float:
        """All three at the same time; where the host waits for the device, it launches nothing ahead, at worst never."""
        computing = self.python + self.device if waits else max(self.python, self.device)
        return max(computing, self.link)


def times_of(cost: Cost) -> Times:
    """Return the times of a row in a layer."""
    both = cost.row + cost.weights
    return Times(
        (both.launches + both.copies) * PYTHON_SECONDS,
        sum(map(kernel_seconds, both.kernels)),
        max(both.up, both.down) / LINK_RATE,
    )


def kernel_seconds(size: Size) -> float:
    """Return the time of one kernel, whose operands pass once while it multiplies."""
    rate = HALF_RATE if size.itemsize <= 2 else FLOAT_RATE
    return LAUNCH_SECONDS + max(size.num_bytes / MEMORY_RATE, operations(size) / rate)
