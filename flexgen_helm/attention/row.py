"""Attention of one row: store its K and V in the pages, attend chunk by chunk, merge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from flexgen_helm.attention.calls import ChunkCall, Window, as_index, plan_attention
from flexgen_helm.attention.chunks import LocatedPages, attend_call
from flexgen_helm.attention.decode import DecodeAttention, DecodePlan, LayerPages
from flexgen_helm.attention.host import HostAttention
from flexgen_helm.attention.kernels import NEG_INF, ChunkOutput, Merged, merge_chunks, normalised
from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.kv_cache.page_format import CacheKey, PageTensors, TokenPlaces
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, Place
from flexgen_helm.kv_cache.working_set import Loaded
from flexgen_helm.memory.link import Transfer
from flexgen_helm.memory.meter import Activity
from flexgen_helm.schedule.rows import Segment

HOST = torch.device("cpu")
LARGEST_KEY = 2.0**58
"""Keys up to this size leave masked scores finite: products with as large a query, summed over 4,096 elements, do in fp32."""
QKV = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values."""
Stores = Mapping[Place, PageTensors]
"""Pages of a layer by their place."""
Locate = Callable[[Place, Tensor], Tensor]
"""Turns numbers of pages ``[n]`` at a place into their indices in the place's tensors: for staged pages, their slots."""
_Spot = tuple[Place, int, int]
"""A stored token: its place, the number of its page there, and its place in the page."""


class _Writes:
    """Plan of a row's writes: its own tokens, and the tokens of a page in which sequences part, copied to the new page."""

    def __init__(self, pages: RowPages, device: torch.device) -> None:
        self._pages, self._device = pages, device
        new: dict[Place, list[tuple[int, int, int]]] = defaultdict(list)
        self._copies: dict[_Spot, _Spot] = {}
        offset = 0
        for segment in pages.row.segments:
            self._copy(segment)
            for i, position in enumerate(range(segment.start, segment.end)):
                place, page, token = self._spot(segment, segment.table[position // PAGE_TOKENS], position % PAGE_TOKENS)
                new[place].append((offset + i, page, token))
            offset += len(segment.tokens)
        copies: dict[tuple[Place, Place], list[tuple[int, int, int, int]]] = defaultdict(list)
        for target, source in self._copies.items():
            copies[source[0], target[0]].append((*source[1:], *target[1:]))
        self._new = [
            (place, as_index([t for t, *_ in x], device), self._columns(place, [y[1:] for y in x])) for place, x in new.items()
        ]
        self._moves = [
            (pair, self._columns(pair[0], [y[:2] for y in x]), self._columns(pair[1], [y[2:] for y in x]))
            for pair, x in copies.items()
        ]

    def apply(self, stores: Stores, locate: Locate, new: tuple[Tensor, Tensor]) -> None:
        """Write a layer's new K and V ``[T, H_kv, D]``, then copy what parting sequences share of a page."""
        for place, rows, (pages, tokens) in self._new:
            pages = locate(place, pages)
            for (part, stored), x in zip(stores[place].writable_parts, new, strict=True):
                part.write(stored, pages, tokens, x[rows])
        for (source_place, target_place), (source_pages, source_tokens), (pages, tokens) in self._moves:
            source_pages, pages = locate(source_place, source_pages), locate(target_place, pages)
            both = zip(stores[source_place].writable_parts, stores[target_place].writable_parts, strict=True)
            for (part, source), (_, target) in both:
                part.copy(TokenPlaces(source, source_pages, source_tokens), TokenPlaces(target, pages, tokens))

    def _copy(self, segment: Segment) -> None:
        if segment.copy is not None:
            source, target, count = segment.copy
            for i in range(count):
                spot = self._spot(segment, source, i)
                # A page copied in this very row is not filled yet: copy from where the token itself is.
                self._copies[self._spot(segment, target, i)] = self._copies.get(spot, spot)

    def _spot(self, segment: Segment, page: int, token: int) -> _Spot:
        return *self._pages.find(page, kept=segment.kept), token

    def _columns(self, place: Place, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        pages, tokens = torch.tensor(rows, device=HOST if place == "host" else self._device).T.contiguous()
        return pages, tokens


class _Outputs:
    """Outputs of a row's T queries for each of a window's R chunks, in fp32.

    Attributes:
        outputs: ``[R, T, H, Dv]``, zeros where a query does not attend to a chunk.
        lse: ``[R, T, H]``, -inf there.
    """

    def __init__(self, window: Window, q: Tensor, value_dim: int) -> None:
        shape = (window.num_chunks, *q.shape[:2])
        self.outputs = torch.empty(*shape, value_dim, dtype=torch.float32, device=q.device)
        self.lse = torch.full(shape, NEG_INF, dtype=torch.float32, device=q.device)
        self.outputs.flatten(0, 1)[window.absent] = 0.0

    def keep(self, call: ChunkCall, part: ChunkOutput) -> None:
        """Put the outputs of a call in their places."""
        output, lse = part
        if call.dead is not None:
            output.masked_fill_(call.dead[:, None, None], 0.0)
            lse.masked_fill_(call.dead[:, None], NEG_INF)
        self.outputs.flatten(0, 1)[call.outputs] = output.float()
        self.lse.flatten(0, 1)[call.outputs] = lse


class RowAttention:
    """The attention of one row, layer after layer. Its plan is made once for each mask rule."""

    def __init__(
        self,
        pages: RowPages,
        cache: PagedCache,
        device: torch.device,
        decode: DecodeAttention | None = None,
        host: HostAttention | None = None,
    ) -> None:
        """Plan nothing yet.

        Args:
            pages: The row and its pages.
            cache: Holds K and V.
            device: The device that computes the row.
            decode: Attends on the CPU, for decode rows. None: the device attends call by call.
            host: Lets it run beside the device. None: the device waits.
        """
        self._pages, self._cache, self._device, self._decode, self._host = pages, cache, device, decode, host
        self._writes = _Writes(pages, device)
        self._plans: dict[MaskRule, list[Window]] = {}
        self._decode_plans: dict[MaskRule, list[DecodePlan]] = {}
        self._loaded: dict[int, Loaded] = {}
        """The row's staged pages of each layer that was loaded and not stored yet."""
        self.bad = torch.zeros(pages.row.size, dtype=torch.bool, device=device)
        """``[T]``: whether a token's K or V was not finite in a layer so far."""

    def load(self, j: int) -> Transfer | None:
        """Start to bring the row's staged pages of layer j. None: it has none."""
        if not self._pages.staged.pages:
            return None
        if j not in self._loaded:
            self._loaded[j] = self._cache.working.load(j, self._pages.staged)
        return self._loaded[j].arriving

    def store(self, j: int) -> Transfer | None:
        """Start to write back the staged pages that layer j wrote. None: nothing is to be written, or nothing was loaded."""
        if self._loaded.pop(j, None) is None:
            return None
        return self._cache.working.release(j, self._pages.staged)

    def attend(
        self, key: CacheKey, qkv: QKV, rule: MaskRule, *, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Store the row's new K and V of one layer and attend.

        Args:
            key: The attention call.
            qkv: Queries ``[T, H, D]``, keys ``[T, H_kv, D]``, values ``[T, H_kv, Dv]``, positions already encoded.
            rule: The layer's mask. Layers that hold an equal rule share a plan.
            scale: Factor of the scores.
            softcap: See `attend_chunk`.
            sinks: ``[H]`` logits, see `normalised`. None: there are none.

        Returns:
            ``[T, H, Dv]`` in the dtype of the values.
        """
        q, k, v = (self._cache.cast(x) for x in qkv)
        k, v = self._cleaned(k, v)
        stores = self._cache.tensors(key, k, v, self._pages.places)
        locate = self._locate(key.layer)
        self._writes.apply(stores, locate, (k, v))
        if self._decode is not None:
            merged, sinks = self._decoded(key.layer, q, rule, stores, scale=scale, softcap=softcap), _on_cpu(sinks)
        else:
            merged = self._in_calls(q, rule, stores, locate, scale=scale, softcap=softcap)
        return normalised(merged, sinks).to(qkv[2].dtype).to(qkv[2].device)

    def _in_calls(
        self, q: Tensor, rule: MaskRule, stores: Stores, locate: Locate, *, scale: float, softcap: float | None
    ) -> Merged:
        """Attend on the device, kernel call by kernel call."""
        if rule not in self._plans:
            self._plans[rule] = plan_attention(self._pages, rule, dtype=q.dtype, device=self._device)
        merged: Merged | None = None
        for window in self._plans[rule]:
            outputs = _Outputs(window, q, next(iter(stores.values())).format.v.dim)
            for call in window.calls:
                pages = [LocatedPages(stores[x.place], locate(x.place, x.numbers), x.which) for x in call.pages]
                outputs.keep(call, attend_call(call, q, pages, scale=scale, softcap=softcap))
            merged = merge_chunks(merged, outputs.outputs, outputs.lse)
        assert merged is not None
        return merged

    def _decoded(self, j: int, q: Tensor, rule: MaskRule, stores: Stores, *, scale: float, softcap: float | None) -> Merged:
        """Attend on the CPU, in one pass, which is where the outcome is."""
        decode = self._decode
        assert decode is not None
        if rule not in self._decode_plans:
            self._decode_plans[rule] = decode.plan(self._pages, rule)
        plans = self._decode_plans[rule]
        slots = self._loaded[j].slots if self._pages.staged.pages else None
        work = partial(decode.attend, plans, q.cpu(), {"exact": LayerPages(stores, slots)}, scale=scale, softcap=softcap)
        if self._host is None:
            return work()
        page_bytes = next(iter(stores.values())).format.num_bytes
        num_bytes = sum(plan.pages.size for plan in plans) * page_bytes
        return self._host.attend(Activity("compute", str(j)), num_bytes, work)

    def _cleaned(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V with zeros for tokens that are not finite, which are noted in `bad`.

        Masks do not hide NaN and infinity: a masked score is added to -inf and its value multiplied by 0. So pages hold finite
        numbers only, whoever reads or reuses them, and a sequence with such a token has no answer.
        """
        k_limit, v_limit = min(LARGEST_KEY, torch.finfo(k.dtype).max), torch.finfo(v.dtype).max
        # To look costs a GPU its head start, to copy costs a CPU more than the look.
        if k.device.type == "cpu" and _largest(k) <= k_limit and _largest(v) <= v_limit:
            return k, v
        good = k.abs().amax((1, 2)) <= k_limit
        good &= v.abs().amax((1, 2)) <= v_limit
        self.bad |= ~good
        kept = good[:, None, None]
        return torch.where(kept, k, 0.0), torch.where(kept, v, 0.0)

    def _locate(self, j: int) -> Locate:
        """Wait for the row's staged pages of layer j."""
        if not self._pages.staged.pages:
            return lambda place, index: index
        self.load(j)
        slots = self._loaded[j].slots
        self._cache.working.wait(self._loaded[j])
        return lambda place, index: slots[index] if place == "staged" else index


def _on_cpu(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.cpu()


def _largest(x: Tensor) -> float:
    """The largest magnitude; NaN where there is one."""
    low, high = torch.aminmax(x)
    return max(-float(low), float(high))
