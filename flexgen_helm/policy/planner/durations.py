"""Durations of the operations of a sweep on a machine, from its profile. No torch.

The quantities are those of FlexGen section 4.3 and appendix A.3: bytes over the rate of their link, products over the rate of
matrix products, attention over its own rate. Different from there: fixed times of calls, whole rows with padding, embeddings
and output head, packed weights, and attention to keys of earlier chunks only, where a measured layer holds that to its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from math import log2
from typing import NamedTuple

from flexgen_helm.errors import PolicyError
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, TRANSFER_BYTES, Form
from flexgen_helm.machine.profile import LayerTime, MachineProfile, Place, Rate, RowKind
from flexgen_helm.memory.tiers import interleave
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.loads import Pages, RowLoad
from flexgen_helm.policy.planner.signature import signature
from flexgen_helm.policy.planner.sweeps import page_bytes_of
from flexgen_helm.policy.working_memory import FP32, LOGITS_COPIES
from flexgen_helm.schedule.operations import head_unit
from flexgen_helm.types import Resource, Tier

MOST_PIECES = 8
"""Most pieces of a transfer over two links; real ones have `TRANSFER_BYTES`. Both links work at once on all but two of them."""
AS_FAST: Mapping[str, str] = {"float16": "bfloat16", "bfloat16": "float16"}
"""Dtypes that take as long as each other, where one was not measured."""
SPARSE_PROMPTS = 3.0
"""Time of sparse attention of prompts over that of dense attention, where a profile has none: 2.0 to 3.7 in runs/LOG.md."""
_SPARSE = re.compile(r"s\d+$")
"""End of the name of a format of which attention reads V of a part of the keys (`flexgen_helm.policy.model_shapes`)."""


class Stage(NamedTuple):
    """Work of one resource.

    Attributes:
        resource: What is busy.
        seconds: Time if nothing else shares it.
        num_bytes: Bytes that are moved.
        pool: What is shared: work of one pool at the same time gets equal parts of it.
    """

    resource: Resource
    seconds: float
    num_bytes: int = 0
    pool: str = ""


class Durations:
    """Stages of every operation under one plan on one machine."""

    def __init__(self, plan: MemoryPlan, profile: MachineProfile, *, whole: ModelShapes | None = None) -> None:
        """Look up what is needed often.

        Args:
            plan: The memory plan.
            profile: The machine.
            whole: Sizes of the model of which the plan is a stage, since measured layers are those of whole models.
        """
        self.plan, self.profile = plan, profile
        self._shapes, self._policy, self._own_memory = plan.shapes, plan.policy, plan.space.own_memory
        self._page_bytes = {form: size / plan.shapes.num_layers for form, size in page_bytes_of(plan).items()}
        kept: Form = "sealed" if "sealed" in self._page_bytes else "exact"
        self._token_bytes = self._page_bytes[kept] / PAGE_TOKENS, self._page_bytes["exact"] / PAGE_TOKENS
        """K and V of a token of a layer, in an earlier chunk and in a query's own."""
        self._streamed = frozenset(plan.weights.streamed)
        num_layers = plan.shapes.num_layers
        whole = whole or plan.shapes
        self._mean_products = sum(map(whole.products_of, range(whole.num_layers))) / whole.num_layers
        name, dtype = signature(whole), whole.dtype_name
        self._layers = {
            (layer.kind, layer.tokens, layer.packed, layer.mapped): layer
            for layer in profile.layers
            if (layer.model, layer.dtype) == (name, dtype)
        }
        kinds: dict[object, int] = {}
        layers = [(plan.shapes.products_of(j), plan.shapes.bound_bytes[j], self._packed(j)) for j in range(num_layers)]
        self._alike = [kinds.setdefault(kind, j) for j, kind in enumerate(layers)]
        """For each layer the first one that takes as long."""
        self._calls: dict[tuple[int, RowLoad, bool], list[Stage]] = {}
        self._moves: dict[tuple[RowLoad, bool], list[list[Stage]]] = {}

    def record(self, row: RowLoad) -> list[Stage]:
        """Return the time in which a row is recorded: measured, or rows of the embedding table are read and written."""
        measured = self._measured(0, row)
        if measured is not None and measured.record_seconds:
            return [self._on_device(measured.record_seconds)]
        return [self._on_device(2 * self._hidden_bytes(row) / self.profile.device_read.value)]

    def layer(self, j: int, row: RowLoad, *, first: bool = True) -> list[Stage]:
        """Return layer j on a row; where the CPU attends beside the device, in three stages.

        Args:
            j: The layer.
            row: The row.
            first: Whether weights come from memory, since another layer was computed before.
        """
        key = self._alike[j], row, first
        if key not in self._calls:
            self._calls[key] = self._layer_stages(j, row, first=first)
        return self._calls[key]

    def _layer_stages(self, j: int, row: RowLoad, *, first: bool) -> list[Stage]:
        seconds, shapes = self._layer_seconds(j, row, first=first), self._shapes
        if not row.on_host:
            return [self._on_device(seconds + self._attention(row, "device", own=self._measured(j, row) is None))]
        # Until Q, K and V of the row's tokens are there; the rest of the layer follows attention.
        products = shapes.hidden_size * (shapes.num_heads + 2 * shapes.num_kv_heads) * shapes.head_dim
        part = min(1.0, products / shapes.products_of(j))
        earlier, own = self._token_bytes
        num_bytes = int(row.earlier_keys * earlier + row.own_keys * own)
        attention = self._attention(row, "host", own=True) + self._over_link(row)
        return [
            self._on_device(part * seconds),
            Stage("cpu_attention", attention, num_bytes, "host"),
            self._on_device((1 - part) * seconds),
        ]

    def finish(self, logits: int) -> list[Stage]:
        """Return the output head on slices of ``gpu_batch_size`` positions, and the choice of tokens; without a head none."""
        if not self._shapes.has_head:
            return [self._on_device(0.0)]
        size, shapes = self._policy.gpu_batch_size, self._shapes
        head = head_unit(shapes.num_layers)
        weights = shapes.bound_bytes.get(head, shapes.vocab_size * shapes.hidden_size * shapes.itemsize)
        seconds = self._products(head, shapes.products_of(head), size, weights)
        seconds += LOGITS_COPIES * size * shapes.vocab_size * FP32 / self.profile.device_read.value
        seconds += self.profile.call_seconds.get("decode", 0.0)
        return [self._on_device(-(-logits // size) * seconds)]

    def weights(self, j: int) -> list[Stage]:
        """Return what follows the reading of a unit's slab from disk: decoding, the link, unpacking."""
        shapes, tier = self._shapes, self.plan.weights.tiers[j]
        packed, coded = shapes.is_packed, shapes.is_coded and (shapes.is_packed or tier == "disk")
        result = shapes.bound_bytes[j]
        if not self._own_memory:
            return [self._unpack("device", result)] if packed or coded else []
        stages: list[Stage] = []
        if coded and tier != "device":
            stages.append(self._unpack("host", shapes.carried_bytes[j]))
        if tier != "device":
            stages.append(self._link("host_to_device", shapes.carried_bytes[j]))
        return [*stages, self._unpack("device", result)] if packed else stages

    def slab(self, j: int) -> list[Stage]:
        """Return the reading of a unit's slab from disk; nothing if it is not there."""
        return [self._link("disk_read", self._shapes.disk_bytes[j])] if self.plan.weights.tiers[j] == "disk" else []

    def load_cache(self, row: RowLoad) -> list[list[Stage]]:
        """Return the pieces in which a row's pages come: each goes over its links one after the other."""
        if (row, False) not in self._moves:
            self._moves[row, False] = self._pieces(row.brought, "disk_read", "host_to_device", chooses=row.kind == "decode")
        return self._moves[row, False]

    def store_cache(self, row: RowLoad) -> list[list[Stage]]:
        """Return the pieces in which a row's pages go."""
        if (row, True) not in self._moves:
            self._moves[row, True] = [piece[::-1] for piece in self._pieces(row.taken, "disk_write", "device_to_host")]
        return self._moves[row, True]

    def hidden(self, row: RowLoad, tier: Tier, *, stores: bool) -> list[Stage]:
        """Return the transfer of a row's hidden state between two layers to or from a tier."""
        num_bytes = self._hidden_bytes(row)
        if tier == "disk":  # the meter counts the disk alone
            found = [self._link("disk_write" if stores else "disk_read", num_bytes)]
            if self._own_memory:
                link = self._link("device_to_host" if stores else "host_to_device", num_bytes)
                found.insert(0 if stores else 1, link._replace(num_bytes=0))
            return found
        return [self._link("device_to_host" if stores else "host_to_device", num_bytes)]

    def hidden_tiers(self, num_rows: int) -> list[Tier]:
        """Return the tier of each row's hidden state between two layers; what is used in place is on the device."""
        tiers = interleave([1] * num_rows, self._policy.hidden)
        return ["device" if tier == "host" and not self._own_memory else tier for tier in tiers]

    def _hidden_bytes(self, row: RowLoad) -> int:
        return row.size * self._shapes.hidden_size * self._shapes.itemsize

    def _packed(self, j: int) -> bool:
        """Return whether a unit's weights may be in the layout of the library that multiplies: those that stay on a CPU."""
        return not self._own_memory and j not in self._streamed

    def _measured(self, j: int, row: RowLoad) -> LayerTime | None:
        mapped = self.plan.maps_large_tensors
        forms = (self._packed(j), mapped), (False, mapped), (self._packed(j), False), (False, False)
        found = (self._layers.get((row.kind, row.size, *form)) for form in forms)
        return next((each for each in found if each is not None), None)

    def _layer_seconds(self, j: int, row: RowLoad, *, first: bool) -> float:
        """Return a layer without attention to earlier chunks: measured, or products bounded by the reading of its weights."""
        measured, shapes = self._measured(j, row), self._shapes
        if measured is not None:
            seconds = measured.seconds if first or not measured.next_seconds else measured.next_seconds
            return seconds * shapes.products_of(j) / self._mean_products
        products = self._products(j, shapes.products_of(j), row.size, shapes.bound_bytes[j])
        return products + self.profile.call_seconds.get(row.kind, 0.0)

    def _products(self, j: int, elements: float, tokens: int, num_bytes: int) -> float:
        """Return the time of products of tokens with matrices: two operations for each token and element, or their reading."""
        rate = self._product_rate(tokens, packed=self._packed(j))
        return max(2 * elements * tokens / rate, num_bytes / self.profile.device_read.value)

    def _product_rate(self, tokens: int, *, packed: bool) -> float:
        """Return the rate of products, linear in the logarithm of tokens between two that were measured."""
        dtype = self._shapes.dtype_name
        of_dtype = [each for each in self.profile.products if each.dtype in (dtype, AS_FAST.get(dtype))]
        rates = [each for each in of_dtype if each.packed and packed] or [each for each in of_dtype if not each.packed]
        rates = [each for each in rates if each.dtype == dtype] or rates
        if not rates:
            raise self._missing(f"matrix products in {dtype}")
        points = sorted((each.tokens, each.rate.value) for each in rates)
        below = [point for point in points if point[0] <= tokens]
        above = [point for point in points if point[0] >= tokens]
        if not below:  # fewer tokens take as long as the fewest that were measured, or as their share of that
            return points[0][1] * max(tokens / points[0][0], 1 / points[0][0])
        if not above:
            return points[-1][1]
        (low, slow), (high, fast) = below[-1], above[0]
        return slow if low == high else slow + (fast - slow) * log2(tokens / low) / log2(high / low)

    def _attention(self, row: RowLoad, place: Place, *, own: bool) -> float:
        """Return the attention of a row in a layer: K and V that are read, or operations on pairs of a query and a key."""
        shapes, exact = self._shapes, self._shapes.kv_name if "sealed" not in self._page_bytes else ""
        exact = exact or {4: "float32"}.get(shapes.kv_itemsize, "bfloat16")
        if row.kind == "decode":
            earlier, mine = self._token_bytes
        else:
            earlier = mine = 4.0 * shapes.num_heads * shapes.head_dim  # products with K, and with V
        seconds = row.earlier_keys * earlier / self._attention_rate(place, row.kind, shapes.kv_name) if row.earlier_keys else 0
        if own and row.own_keys:
            seconds += row.own_keys * mine / self._attention_rate(place, row.kind, exact)
        return seconds

    def _attention_rate(self, place: Place, kind: RowKind, form: str) -> float:
        """Return the rate of attention.

        Of a format that was not measured it is the slowest of those that read as much of V, from the same bits if there is one.
        Where sparse attention was not measured at all, prompts take `SPARSE_PROMPTS` times as long as in dense attention.
        """
        found = {each.format: each.rate.value for each in self.profile.attention if (each.place, each.kind) == (place, kind)}
        if not found:
            raise self._missing(f"attention of {kind} rows on the {place}")
        if form in found:
            return found[form]
        bits, is_sparse = _parted(form)
        alike = {name: rate for name, rate in found.items() if _parted(name)[1] == is_sparse}
        slower = SPARSE_PROMPTS if is_sparse and not alike and kind == "prefill" else 1.0
        alike = alike or found
        same = {name: rate for name, rate in alike.items() if _parted(name)[0] == bits}
        return min((same or alike).values()) / slower

    def _over_link(self, row: RowLoad) -> float:
        """Return the time in which Q, K, V go to the CPU that attends, and its output comes back."""
        shapes = self._shapes
        token = shapes.head_dim * shapes.itemsize
        down, up = (shapes.num_heads + 2 * shapes.num_kv_heads) * token, shapes.num_heads * token
        links = self._rate("device_to_host"), self._rate("host_to_device")
        return row.size * (down / links[0] + up / links[1])

    def _pieces(self, pages: Pages, disk: Resource, link: Resource, *, chooses: bool = False) -> list[list[Stage]]:
        found: list[list[Stage]] = []
        for tier, form, count in pages:
            # Of V on the host only rows that are chosen travel; a block of the disk holds rows of many tokens.
            part = self._shapes.chosen_share if chooses and form == "sealed" and tier == "host" else 1.0
            padding = self._shapes.disk_padding.get(form, 1.0) if tier == "disk" else 1.0
            num_bytes = int(count * self._page_bytes[form] * padding * part)
            ways: list[Resource] = [*([disk] if tier == "disk" else []), *([link] if self._own_memory else [])]
            number = max(1, min(-(-num_bytes // TRANSFER_BYTES), MOST_PIECES)) if len(ways) > 1 else 1
            cuts = [num_bytes * i // number for i in range(number + 1)]
            found += [[self._link(way, end - begin) for way in ways] for begin, end in pairwise(cuts)]
        return found

    def _on_device(self, seconds: float) -> Stage:
        return Stage("device", seconds, 0, "device" if self.profile.is_gpu else "host")

    def _unpack(self, place: Place, num_bytes: int) -> Stage:
        """Return unpacking; on a CPU its threads share the cores with those that compute, and on a GPU the device."""
        form, dtypes = self._shapes.weight_format, ("", self._shapes.dtype_name)
        found = {u.format: u.rate.value for u in self.profile.unpack if u.place == place and u.dtype in dtypes}
        names = [name for name in found if form == name or form.startswith(f"{name}-")]
        if not names:
            raise self._missing(f"unpacking {form} on the {place}")
        rate = found[max(names, key=len)]
        pool = "device" if place == "device" and self.profile.is_gpu else "host"
        return Stage("unpack", num_bytes / rate, 0, pool)

    def _link(self, way: Resource, num_bytes: int) -> Stage:
        return Stage(way, num_bytes / self._rate(way), num_bytes, way)

    def _rate(self, way: str) -> float:
        rate: Rate | None = getattr(self.profile, way)
        if rate is None:
            raise self._missing(way.replace("_", " "))
        return rate.value

    def _missing(self, what: str) -> PolicyError:
        return PolicyError(
            f"The profile of {self.profile.name} does not say how fast {what} is, which this policy needs. Measure the machine "
            "with `flexgen-helm profile`, or write the rate into the profile."
        )


def _parted(form: str) -> tuple[str, bool]:
    """Return the bits or the dtype of a format of K and V, and whether attention over it is sparse."""
    bits = _SPARSE.sub("", form)
    return bits, bits != form
