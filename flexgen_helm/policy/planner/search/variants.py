"""Sizes of a model in another form, for predictions before anything is compressed. No torch."""

from __future__ import annotations

from dataclasses import replace

from flexgen_helm.policy.model_shapes import EMBEDDINGS, ModelShapes

BITS_OF_A_BYTE = 8


def with_packed_weights(shapes: ModelShapes, bits: float, weight_format: str) -> ModelShapes:
    """Return the sizes of a model whose matrices are packed, about: what stays uncompressed in a unit is left out.

    Args:
        shapes: Sizes of the model as it is.
        bits: Bits of a weight, scales included, such as 4.5.
        weight_format: Name of the format, as a profile's rates of unpacking have it, such as "w4".
    """
    share = bits / BITS_OF_A_BYTE / shapes.itemsize
    packed = {j: int(share * count) for j, count in shapes.bound_bytes.items()}
    return replace(
        shapes,
        stored_bytes={EMBEDDINGS: shapes.stored_bytes[EMBEDDINGS], **packed},
        carried_bytes=packed,
        disk_bytes=packed,
        is_coded=False,
        is_packed=True,
        weight_format=weight_format,
    )
