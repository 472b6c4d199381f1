"""Sizes that all tiny models have in common."""

from __future__ import annotations

VOCAB_SIZE = 320
MAX_LENGTH = 640
"""Context window in tokens of every tiny model."""
WINDOW = 8
"""Sliding windows and attention chunks, in tokens."""
