"""The schedule as plain data: which operation follows which (FlexGen section 4.1, Fig. 3, Alg. 1).

Square (layer j, row k) needs (j - 1, k), and (j, k') for the rows k' that hold its prefix. Rows are ordered so that a prefix
comes first, so both orders below are legal. Every executor runs operations in the order in which they are generated; an
overlapped one only starts what it loads and stores, and waits where the result is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import cycle, islice
from typing import Literal, NamedTuple

Order = Literal["zigzag", "row"]


class Operation(NamedTuple):
    """One step of a sweep: ``kind`` on layer ``j``, for row ``k`` (-1 where the step is not about a row)."""

    kind: Literal["load_weights", "release_weights", "load_cache", "load_hidden", "compute", "store_cache", "store_hidden"]
    j: int
    k: int = -1


class Visit(NamedTuple):
    """A layer, and the rows that go through it before the next layer's turn."""

    j: int
    rows: range


def zigzag_order(num_layers: int, num_rows: int) -> Iterator[Visit]:
    """Column by column: a layer's weights are loaded once for all rows of the block."""
    return (Visit(j, range(num_rows)) for j in range(num_layers))


def row_order(num_layers: int, num_rows: int) -> Iterator[Visit]:
    """Row by row, as most systems do: every row loads all weights again."""
    return (Visit(j, range(k, k + 1)) for k in range(num_rows) for j in range(num_layers))


ORDERS: dict[Order, Callable[[int, int], Iterator[Visit]]] = {"zigzag": zigzag_order, "row": row_order}


def sweep_operations(
    order: Order, num_layers: int, num_rows: int, *, streamed: Collection[int] = (), num_slots: int = 0
) -> Iterator[Operation]:
    """Generate the operations of a sweep.

    What a row needs is loaded before the row before it is computed, which hides the transfer. Weights of a streamed layer are
    loaded as soon as a slot is free, so that theirs hides behind all rows of the layers before; at the end of a sweep they are
    the first ones of the next sweep. A row that goes on to the next layer at once keeps its hidden state on the device, and
    after the last layer only what the output head needs of it is kept.

    Args:
        order: Which layer meets which row when.
        num_layers: Layers that every row goes through.
        num_rows: Rows of the sweep.
        streamed: Layers whose weights do not stay on the device; num_layers itself stands for the output head.
        num_slots: How many of them lie on the device at a time.
    """
    visits = [*ORDERS[order](num_layers, num_rows), Visit(num_layers, range(0))]
    due = cycle([visit.j for visit in visits if visit.j in streamed])
    for j in islice(due, num_slots):
        yield Operation("load_weights", j)
    squares = [(visit.j, k) for visit in visits for k in visit.rows]
    following = iter([*squares[1:], (num_layers, -1)])
    if squares:
        yield Operation("load_cache", *squares[0])
        yield Operation("load_hidden", *squares[0])
    for j, rows in visits:
        for k in rows:
            yield from _step((j, k), next(following), num_layers)
        if j in streamed:
            yield Operation("release_weights", j)
            yield Operation("load_weights", next(due))


def _step(square: tuple[int, int], following: tuple[int, int], num_layers: int) -> Iterator[Operation]:
    """Compute a square while the next one's row is loaded; (num_layers, -1) follows the last one."""
    moves_on = following[1] != square[1]
    if following[0] < num_layers:
        yield Operation("load_cache", *following)
        if moves_on:
            yield Operation("load_hidden", *following)
    yield Operation("compute", *square)
    yield Operation("store_cache", *square)
    if moves_on and square[0] < num_layers - 1:
        yield Operation("store_hidden", *square)


def rows_at_once(*, suspends: bool) -> int:
    """Rows whose pages are brought at a time: the one that computes, the next, and one that rests while the CPU attends."""
    return 3 if suspends else 2
