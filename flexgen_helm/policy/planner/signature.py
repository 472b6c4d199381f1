"""Signature of a model: what a profile knows the times of its layers by. No torch."""

from __future__ import annotations

from flexgen_helm.policy.model_shapes import ModelShapes


def signature(shapes: ModelShapes) -> str:
    """Return a text that is equal for models whose layers take equally long in the same dtype.

    It has the number of layers, hidden size, heads, K/V heads, head size, vocabulary, and elements of matrices by which the
    first layer multiplies a token. Dtype and storage are no part of it.
    """
    heads = f"{shapes.num_heads}x{shapes.head_dim}/{shapes.num_kv_heads}"
    return f"L{shapes.num_layers}-h{shapes.hidden_size}-a{heads}-v{shapes.vocab_size}-p{shapes.products_of(0):.0f}"
