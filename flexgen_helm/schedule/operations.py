"""The schedule as plain data: which operation follows which (FlexGen section 4.1, Fig. 3).

Square (layer j, row k) needs (j - 1, k), and (j, k') for the rows k' that hold its prefix. Rows are ordered so that a prefix
comes first, so both orders below are legal. An executor runs operations in the order in which they are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

Order = Literal["zigzag", "row"]


class Operation(NamedTuple):
    """One step of a sweep: ``kind`` on layer ``j``, for row ``k`` (-1 where the step is not about a row)."""

    kind: Literal["load_weights", "compute"]
    j: int
    k: int = -1


def zigzag_order(num_layers: int, num_rows: int) -> Iterator[Operation]:
    """Column by column: a layer's weights are loaded once for all rows of the block."""
    for j in range(num_layers):
        yield Operation("load_weights", j)
        for k in range(num_rows):
            yield Operation("compute", j, k)


def row_order(num_layers: int, num_rows: int) -> Iterator[Operation]:
    """Row by row, as most systems do: every row loads all weights again."""
    for k in range(num_rows):
        for j in range(num_layers):
            yield Operation("load_weights", j)
            yield Operation("compute", j, k)


ORDERS: dict[Order, Callable[[int, int], Iterator[Operation]]] = {"zigzag": zigzag_order, "row": row_order}
