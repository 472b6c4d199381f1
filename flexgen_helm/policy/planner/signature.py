"""Signature of a model: the sizes that decide how long a layer takes, as a short text."""

from __future__ import annotations

from flexgen_helm.policy.model_shapes import ModelShapes


def signature(shapes: ModelShapes) -> str:
    """Return the same text for models whose layers take the same time in the same dtype, however weights are stored.

    It names hidden size, heads of queries and of K and V, elements of a head, outputs of a layer's matrices, and millions of
    elements of a layer, each different one with its share of the layers.
    """
    sizes = [shapes.bound_bytes[j] / shapes.itemsize / 1e6 for j in range(shapes.num_layers)]
    texts = [f"{size:.3g}M" for size in sizes]
    layers = "+".join(
        text if texts.count(text) == len(texts) else f"{texts.count(text)}/{len(texts)}x{text}" for text in dict.fromkeys(texts)
    )
    heads = f"{shapes.num_heads}/{shapes.num_kv_heads}x{shapes.head_dim}"
    return f"{shapes.hidden_size} {heads} {shapes.outputs_per_token} {layers}"
