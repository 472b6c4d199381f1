"""The schedule as plain data: which operation follows which (FlexGen section 4.1, Fig. 3, Alg. 1).

Square (layer j, row k) needs (j - 1, k), and (j, k') for the rows k' that hold its prefix. Rows are ordered so that a prefix
comes first, so both orders below are legal. Every executor runs operations in the order in which they are generated; an
overlapped one only starts what it loads and stores, and waits where the result is needed (`dependencies.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import cycle, islice
from typing import Literal, NamedTuple

Order = Literal["zigzag", "row"]
OperationKind = Literal[
    "record",
    "load_weights",
    "release_weights",
    "load_cache",
    "load_hidden",
    "compute",
    "store_cache",
    "store_hidden",
    "finish",
]


class Operation(NamedTuple):
    """One step of a sweep: ``kind`` on unit ``j``, for row ``k`` (-1 where the step is not about a row).

    Units are numbered as in `head_unit`. `record` gives a row the hidden state that the layer before the first would give, so
    its j is one less than that of the first layer. `store_hidden` brings away what layer j, or recording, gave.
    """

    kind: OperationKind
    j: int
    k: int = -1


class Turn(NamedTuple):
    """A layer, and the rows that go through it before the next layer's turn."""

    j: int
    rows: range


class _Square(NamedTuple):
    """A layer and a row that goes through it."""

    j: int
    k: int


def head_unit(num_layers: int) -> int:
    """Number of the output head among the units that are computed in turn; layers have 0 to ``num_layers - 1``."""
    return num_layers


def zigzag_order(layers: range, num_rows: int) -> Iterator[Turn]:
    """Column by column: a layer's weights are loaded once for all rows of the block."""
    return (Turn(j, range(num_rows)) for j in layers)


def row_order(layers: range, num_rows: int) -> Iterator[Turn]:
    """Row by row, as most systems do: every row loads all weights again."""
    return (Turn(j, range(k, k + 1)) for k in range(num_rows) for j in layers)


ORDERS: dict[Order, Callable[[range, int], Iterator[Turn]]] = {"zigzag": zigzag_order, "row": row_order}


def sweep_operations(
    order: Order,
    num_layers: int,
    num_rows: int,
    *,
    layers: range | None = None,
    streamed: Collection[int] = (),
    num_slots: int = 0,
) -> Iterator[Operation]:
    """Generate the operations of a sweep.

    All rows are recorded first. Weights of a streamed unit are loaded as soon as a slot is free, so that their transfer hides
    behind all rows of the layers before; at the end of a sweep they are the first ones of the next sweep.

    Args:
        order: Order in which rows go through layers.
        num_layers: Layers of the model.
        num_rows: Rows of the sweep.
        layers: Those that are computed here; None: all. The output head is computed where the last one is.
        streamed: Units whose weights do not stay on the device.
        num_slots: How many of them lie on the device at a time.
    """
    layers = range(num_layers) if layers is None else layers
    head = head_unit(num_layers)
    turns = _turns(order, layers, num_rows, head)
    due = cycle([turn.j for turn in turns if turn.j in streamed])
    yield from _records(layers.start - 1, num_rows)
    for j in islice(due, num_slots):
        yield Operation("load_weights", j)
    squares = [_Square(turn.j, k) for turn in turns for k in turn.rows]
    following = iter([*squares[1:], None])
    yield from _loads(squares[0] if squares else None, hidden=True)
    for j, rows in turns:
        for k in rows:
            yield from _step(_Square(j, k), next(following), last=j == layers.stop - 1)
        if j == head:
            yield Operation("finish", head)
        if j in streamed:
            yield Operation("release_weights", j)
            yield Operation("load_weights", next(due))


def _turns(order: Order, layers: range, num_rows: int, head: int) -> list[Turn]:
    """Return the turns of all layers and, behind the model's last one, of the output head."""
    return [*ORDERS[order](layers, num_rows), *([Turn(head, range(0))] if layers.stop == head else [])]


def _records(j: int, num_rows: int) -> Iterator[Operation]:
    for k in range(num_rows):
        yield Operation("record", j, k)
        yield Operation("store_hidden", j, k)


def _loads(square: _Square | None, *, hidden: bool) -> Iterator[Operation]:
    if square is not None:
        yield Operation("load_cache", *square)
        if hidden:
            yield Operation("load_hidden", *square)


def _step(square: _Square, following: _Square | None, *, last: bool) -> Iterator[Operation]:
    """Compute a square; the row of the following one is loaded before it, which hides the transfer.

    A row that goes on to the next layer at once keeps its hidden state on the device. The last layer's is not stored: only what
    the output head needs of it is kept, or it goes to another stage.
    """
    moves_on = following is None or following.k != square.k
    yield from _loads(following, hidden=moves_on)
    yield Operation("compute", *square)
    yield Operation("store_cache", *square)
    if moves_on and not last:
        yield Operation("store_hidden", *square)
