"""Model sizes, read from a transformers model that may be on the meta device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexgen_helm.kv_cache.cache_format import PLAIN_CACHE, CacheFormat
from flexgen_helm.kv_cache.page_format import PageFormat
from flexgen_helm.kv_cache.pages import Form
from flexgen_helm.loading.assembly import FEW_TOKENS
from flexgen_helm.memory.slab import Plain, SlabFormat
from flexgen_helm.model.layers import layers_of, num_layers_of_every_kind
from flexgen_helm.policy.model_shapes import EMBEDDINGS, ModelShapes
from flexgen_helm.policy.roofline import layer_sizes

SCORED_KEYS = 8192
"""Most keys for whose scores in sparse attention memory is planned."""


def shapes_of(
    model: PreTrainedModel,
    formats: Mapping[int, SlabFormat],
    kv_dtype: torch.dtype,
    cache: CacheFormat = PLAIN_CACHE,
    *,
    weight_format: str = "plain",
) -> ModelShapes:
    """Read the sizes of a model.

    Args:
        model: The model, on any device, such as meta.
        formats: Slab formats of its layers, and of its output head if that has weights of its own.
        kv_dtype: Dtype in which K and V are stored.
        cache: Format in which they are stored.
        weight_format: See `ModelShapes`.
    """
    layers = layers_of(model)
    vocab, hidden = _table(model).shape
    heads = setting(model, "num_attention_heads") or 1
    num_kv, head_dim = setting(model, "num_key_value_heads") or heads, setting(model, "head_dim") or hidden // heads
    kv = torch.empty(0, num_kv, head_dim, dtype=kv_dtype)
    plain, forms = PLAIN_CACHE.forms(kv, kv)["exact"].num_bytes, cache.forms(kv, kv)
    longest = min(setting(model, "max_position_embeddings") or SCORED_KEYS, SCORED_KEYS)
    stored = {j: each.stored.num_bytes for j, each in formats.items()}
    bound = {j: each.bound.num_bytes for j, each in formats.items()}
    tied = set(model.all_tied_weights_keys)
    total = sum(tensor.nbytes for key, tensor in model.state_dict().items() if key not in tied)
    return ModelShapes(
        num_layers=len(layers),
        stored_bytes={**stored, EMBEDDINGS: max(0, total - sum(bound.values()))},
        carried_bytes={j: each.carried.num_bytes for j, each in formats.items()},
        bound_bytes=bound,
        disk_bytes=stored,
        is_coded=any(each.is_coded for each in formats.values()),
        is_packed=any(each.is_packed for each in formats.values()),
        vocab_size=vocab,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=num_kv,
        head_dim=head_dim,
        outputs_per_token=max(_outputs(layer, setting(model, "num_experts_per_tok")) for layer in layers),
        itemsize=model.dtype.itemsize,
        kv_itemsize=kv_dtype.itemsize,
        first_layers_bytes=_first_layers_bytes(model, layers),
        first_layers_vocab=min(FEW_TOKENS, vocab),
        page_shares={form: pages.num_bytes / plain for form, pages in forms.items()},
        disk_padding={
            form: each.disk_bytes / each.num_bytes for form, each in forms.items() if each.disk_bytes > each.num_bytes
        },
        cache_bits=forms.get("sealed", forms["exact"]).bits_per_element,
        mean_share=sum(pages.mean_bytes for pages in forms.values()) / plain,
        chosen_share=_chosen_share(forms, cache.sparsity, heads // num_kv),
        sparsity=cache.sparsity,
        scored_keys=0 if cache.sparsity is None else longest,
        layer_products=_products(model, layers),
        dtype=str(model.dtype).removeprefix("torch."),
        weight_format=weight_format,
        kv_format=cache.name or str(kv_dtype).removeprefix("torch."),
    )


def _chosen_share(forms: Mapping[Form, PageFormat], percent: int | None, group: int) -> float:
    """See `ModelShapes.chosen_share`: query heads of a group are taken to choose at random."""
    pages = forms.get("sealed")
    if percent is None or pages is None:
        return 1.0
    chosen = 1 - (1 - percent / 100) ** group
    return (pages.k.num_bytes + chosen * pages.v.num_bytes) / pages.num_bytes


def plain_formats(model: PreTrainedModel) -> dict[int, SlabFormat]:
    """Return uncompressed slab formats by unit number, for the layers and an output head with weights of its own."""
    units = [*layers_of(model), *filter(None, [own_head(model)])]
    return {j: Plain.of(unit) for j, unit in enumerate(units)}


def own_head(model: PreTrainedModel) -> nn.Module | None:
    """Return the output head of a model if it has weights of its own."""
    head: nn.Module | None = model.get_output_embeddings()
    tied = model.all_tied_weights_keys
    if head is None or any(model.get_parameter_or_buffer(key) is head.weight for key in tied):
        return None
    return head


def setting(model: PreTrainedModel, name: str) -> int | None:
    """Return an integer of the config; None if it is missing or differs between layers."""
    try:
        found = getattr(model.config.get_text_config(decoder=True), name, None)
    except RuntimeError:  # one for each layer
        return None
    return found if isinstance(found, int) else None


def _first_layers_bytes(model: PreTrainedModel, layers: list[nn.Module]) -> int:
    table = _table(model)
    weights = sum(p.nbytes for layer in layers[: num_layers_of_every_kind(model, layers)] for p in layer.parameters())
    return weights + 2 * min(FEW_TOKENS, table.shape[0]) * table.shape[1] * model.dtype.itemsize


def _products(model: PreTrainedModel, layers: list[nn.Module]) -> dict[int, float]:
    """Return the elements of matrices by which each layer multiplies a token."""
    experts = setting(model, "num_experts_per_tok")
    sizes = {j: layer_sizes([layer], experts) for j, layer in enumerate(layers)}
    return {j: found.active_weights for j, found in sizes.items() if found is not None}


def _outputs(layer: nn.Module, num_experts: int | None) -> int:
    """Return the outputs of a layer's matrices for one token, in elements; only the experts that a token uses count."""
    shapes = [p.shape for p in layer.parameters() if p.dim() > 1]
    return sum(shape[0] if len(shape) == 2 else shape[1] * min(shape[0], num_experts or shape[0]) for shape in shapes)


def _table(model: PreTrainedModel) -> Tensor:
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return table
