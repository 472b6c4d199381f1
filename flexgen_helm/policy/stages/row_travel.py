"""Rows between two stages of a pipeline: the frames in which their bytes travel, and the memory that they take. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.types import ResolvedPolicy

BAD, FAILED = 1, 1
"""Bytes of a token, and of a row, behind its hidden state: whether K or V were not finite, whether it was not computed."""
LENGTH_BYTES = 8
"""Bytes in front of what is sent, which say how long it is."""
MOST_FRAME = 2**20
"""Most bytes of a frame of rows. Each frame costs some calls, so they are large; most rows are one frame."""
POSTED_BYTES = 2**23
"""Bytes that a stage is ready to receive at any time. So many are on their way within the time in which a stage hears that the
receiver is ready again: 40 MB/s at 100 ms of latency, 400 MB/s at 10 ms."""
LEAST_WINDOW, MOST_WINDOW = 8, 64
"""Frames that a stage is ready to receive at any time."""


@dataclass(frozen=True)
class Frames:
    """How bytes travel: cut into frames, of which the receiver is ready for several at any time. Both ends must agree.

    Attributes:
        num_bytes: Bytes of a frame; the last one of what is sent may be shorter.
        window: Frames for which the receiver has buffers.
    """

    num_bytes: int
    window: int

    @property
    def posted_bytes(self) -> int:
        """Bytes of the receiver's buffers."""
        return self.num_bytes * self.window


def row_bytes(token_bytes: int, tokens: int) -> int:
    """Return the bytes of a row with what goes with it.

    Args:
        token_bytes: Bytes of the hidden state of a token.
        tokens: Tokens of the row.
    """
    return tokens * (token_bytes + BAD) + FAILED


def row_frames(token_bytes: int, policy: ResolvedPolicy) -> Frames:
    """Return the frames in which rows travel.

    Args:
        token_bytes: Bytes of the hidden state of a token.
        policy: Row sizes.
    """
    largest = LENGTH_BYTES + row_bytes(token_bytes, max(policy.gpu_batch_size, policy.gpu_batch_tokens))
    num_bytes = min(MOST_FRAME, largest)
    return Frames(num_bytes, min(MOST_WINDOW, max(LEAST_WINDOW, -(-POSTED_BYTES // num_bytes))))


def token_travel_bytes(shapes: ModelShapes, policy: ResolvedPolicy) -> int:
    """Return the bytes that a token of a sweep takes on its way to and from other stages, in all sweeps in flight.

    A row waits until this stage computes it, and is kept behind that until the last stage has answered.
    """
    lanes = policy.num_lanes or 1
    return sum(shapes.borders) * lanes * (shapes.hidden_size * shapes.itemsize + BAD)


def travel_bytes(shapes: ModelShapes, policy: ResolvedPolicy, prompt_tokens: int) -> int:
    """Return the most bytes of rows on their way to and from other stages; 0 without any.

    Args:
        shapes: Sizes of the stage.
        policy: Row sizes and sweeps in flight.
        prompt_tokens: Prompt tokens of a sweep, of which each may also have a full block that decodes.
    """
    posted = row_frames(shapes.hidden_size * shapes.itemsize, policy).posted_bytes if shapes.borders[0] else 0
    return posted + (prompt_tokens + policy.block_size) * token_travel_bytes(shapes, policy)
