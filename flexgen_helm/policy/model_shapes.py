"""Sizes of a model, from which memory and time are computed. Needs neither torch nor weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flexgen_helm.kv_cache.pages import Form
from flexgen_helm.schedule.operations import head_unit
from flexgen_helm.types import Tier

DTYPES = {4: "float32", 2: "bfloat16"}
"""Most widespread dtype of each number of bytes."""
EMBEDDINGS = -1
"""Number of the embedding tables among the units of a model. Layers have 0 to L - 1, and the output head has L."""


def sparse_name(form: str, percent: int | None) -> str:
    """Return the name of a format of which attention reads V of a part of the keys, such as "bfloat16s10"; None: of all."""
    return form if percent is None else f"{form}s{percent}"


@dataclass(frozen=True)
class ModelShapes:
    """Sizes of a model that decide how many bytes it takes.

    Attributes:
        num_layers: Decoder layers, L.
        stored_bytes: Bytes of every unit as it is stored in host memory. Small weights outside of the layers count as
            embeddings. The head is a unit only if it has weights of its own.
        carried_bytes: Bytes of every layer, and of the head if it is a unit, on a link and on a device with its own memory.
        bound_bytes: The same, as the device computes with it.
        disk_bytes: The same in a slab on disk; at most, before slabs are there.
        is_coded: Whether what is on disk, and what is stored in another form than the carried one, is decoded by the CPU.
        is_packed: Whether carried and bound form differ, so that every unit needs a slot on the device.
        vocab_size: Rows of the embedding table.
        hidden_size: Elements of a token's hidden state.
        num_heads: Query heads of a layer.
        num_kv_heads: Heads of K and of V.
        head_dim: Elements of a head.
        outputs_per_token: Outputs of all matrices of the widest layer for one token, in elements.
        itemsize: Bytes of an element of hidden states and weights.
        kv_itemsize: Bytes of an element of K and V.
        first_layers_bytes: Bytes of the small model that is checked first: the first layers up to one of every kind, and a
            part of the vocabulary.
        first_layers_vocab: Tokens of the vocabulary of that small model.
        page_shares: Bytes of a page of K and V by form, for each byte of one in which they are as they come.
        disk_padding: Bytes in a file for each byte of a page, by form, since records are whole pages of memory; a form that
            is missing has 1.
        cache_bits: Stored bits of an element of K, and of one of V, in the form in which pages are kept.
        mean_share: Bytes of the mean of V of a sealed page, likewise: on the device, whatever tier the page is on.
        chosen_share: Bytes of a kept page that a decode row brings from the host, for each byte of it: with sparse attention K
            and the rows of V that its heads choose, about.
        sparsity: Per cent of the keys of earlier chunks of which attention reads V; None: all.
        scored_keys: Keys whose scores a row of prompts holds at once, for each query and head.
        layer_products: Elements of matrices by which a layer multiplies a token, by layer; of a mixture of experts only those
            of the experts that a token uses. Where a layer is missing, all of its weights count.
        dtype: Dtype of weights and hidden states, such as "bfloat16"; "": the widespread one of its size.
        weight_format: Format in which weights are stored, as `flexgen_helm.machine.profile.UnpackRate` names it; "plain": as
            they are bound.
        kv_format: Format of the kept pages of K and V, as `flexgen_helm.machine.profile.AttentionRate` names it; "": the
            dtype's.
        has_head: Whether the output head is computed here; not on the stages of a pipeline before the last one.
        borders: Whether rows come from a stage of a pipeline before this one, and go to one behind it.
    """

    num_layers: int
    stored_bytes: Mapping[int, int]
    carried_bytes: Mapping[int, int]
    bound_bytes: Mapping[int, int]
    disk_bytes: Mapping[int, int]
    is_coded: bool
    is_packed: bool
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    outputs_per_token: int
    itemsize: int
    kv_itemsize: int
    first_layers_bytes: int
    page_shares: Mapping[Form, float] = field(default_factory=lambda: {"exact": 1.0})
    disk_padding: Mapping[Form, float] = field(default_factory=dict)
    cache_bits: tuple[float, float] = (16.0, 16.0)
    mean_share: float = 0.0
    chosen_share: float = 1.0
    sparsity: int | None = None
    scored_keys: int = 0
    first_layers_vocab: int = 0
    layer_products: Mapping[int, float] = field(default_factory=dict)
    dtype: str = ""
    weight_format: str = "plain"
    kv_format: str = ""
    has_head: bool = True
    borders: tuple[bool, bool] = (False, False)

    @property
    def total_bytes(self) -> int:
        """Bytes of all units as they are stored."""
        return sum(self.stored_bytes.values())

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest unit as it is stored."""
        return max(self.stored_bytes.values())

    def total_on(self, tier: Tier, *, own_memory: bool) -> int:
        """Return the bytes of all units as device or host keep them; on the disk they take no more than on the host."""
        if tier != "device" or not own_memory:
            return self.total_bytes
        return self.stored_bytes[EMBEDDINGS] + sum(self.carried_bytes.values())

    def largest_on(self, tier: Tier, *, own_memory: bool) -> int:
        """Return the bytes of the largest unit as device or host keep it."""
        if tier != "device" or not own_memory:
            return self.largest_bytes
        return max(self.stored_bytes[EMBEDDINGS], *self.carried_bytes.values())

    @property
    def loading_bytes(self) -> int:
        """Bytes that loading holds at a time: a unit as it is read, and as it is stored or carried."""
        decoding = max(self.stored_bytes[j] + size for j, size in self.carried_bytes.items()) if self.is_coded else 0
        return max(2 * self.largest_bytes, decoding)

    @property
    def has_own_head(self) -> bool:
        """Whether the output head has weights of its own."""
        return head_unit(self.num_layers) in self.bound_bytes

    @property
    def dtype_name(self) -> str:
        """Name of the dtype of weights and hidden states."""
        return self.dtype or DTYPES[self.itemsize]

    @property
    def kv_name(self) -> str:
        """Name of the format in which kept K and V are read: of their dtype or bits, and of what is read of V."""
        return sparse_name(self.kv_format or DTYPES[self.kv_itemsize], self.sparsity)

    def products_of(self, j: int) -> float:
        """Return the elements of matrices by which unit j multiplies a token."""
        if j == head_unit(self.num_layers):
            return self.vocab_size * self.hidden_size
        return self.layer_products.get(j, self.bound_bytes[j] / self.itemsize)

    def of_layers(self, layers: range, *, has_head: bool | None = None) -> ModelShapes:
        """Return the sizes of a stage of a pipeline: a small model of some of the layers, numbered from 0.

        Every stage has the embeddings, since recording a row needs them, and checks the same first layers of the whole model.

        Args:
            layers: Its layers, which follow each other.
            has_head: Whether it computes the output head; None: if it has the last layer.

        Raises:
            ValueError: If the model has no such layers.
        """
        if not layers or layers.step != 1 or layers.start < 0 or layers.stop > self.num_layers:
            raise ValueError(f"{layers} are not layers of a model that has {self.num_layers}")
        has_head = layers.stop == self.num_layers if has_head is None else has_head
        numbers = {j: i for i, j in enumerate(layers)} | {EMBEDDINGS: EMBEDDINGS}
        if has_head:
            numbers[head_unit(self.num_layers)] = head_unit(len(layers))
        stored, carried, bound, disk = (
            {numbers[j]: size for j, size in sizes.items() if j in numbers}
            for sizes in (self.stored_bytes, self.carried_bytes, self.bound_bytes, self.disk_bytes)
        )
        return replace(
            self,
            num_layers=len(layers),
            stored_bytes=stored,
            carried_bytes=carried,
            bound_bytes=bound,
            disk_bytes=disk,
            layer_products={numbers[j]: count for j, count in self.layer_products.items() if j in numbers},
            has_head=has_head,
            borders=(layers.start > 0, layers.stop < self.num_layers),
        )

    def at_16_bits(self) -> ModelShapes:
        """Return the sizes with two bytes for every element of weights, K and V, whatever their dtype and compression."""
        bound = {j: 2 * count // self.itemsize for j, count in self.bound_bytes.items()}
        stored = {EMBEDDINGS: 2 * self.stored_bytes[EMBEDDINGS] // self.itemsize, **bound}
        first_layers = 2 * self.first_layers_bytes // self.itemsize
        dtype = self.dtype if self.itemsize == 2 else "bfloat16"
        return replace(
            self,
            stored_bytes=stored,
            carried_bytes=bound,
            bound_bytes=bound,
            disk_bytes=bound,
            is_coded=False,
            is_packed=False,
            itemsize=2,
            kv_itemsize=2,
            first_layers_bytes=first_layers,
            page_shares={"exact": 1.0},
            disk_padding={},
            cache_bits=(16.0, 16.0),
            mean_share=0.0,
            chosen_share=1.0,
            sparsity=None,
            scored_keys=0,
            dtype=dtype,
            weight_format="plain",
            kv_format=dtype,
        )

    @property
    def kept_share(self) -> float:
        """`page_shares` of the form in which pages are kept, with the means of V."""
        return self.page_shares.get("sealed", self.page_shares["exact"]) + self.mean_share

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers as they come, about: layers may differ."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_itemsize
